"""The commands `inferix generate`, `play`, `convert` and `doctor`, each a module; cli.py is the command line."""
