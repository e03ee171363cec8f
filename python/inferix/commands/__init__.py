"""The commands `inferix generate`, `play`, `convert` and `doctor`, each also a function of a program.

options.py   an option: a field of a dataclass with its help, default and range, checked when it is made
configs.py   the options of every command
cli.py       the command line, built from these
generate.py  generation.py: one video asked for; maker.py: the loop over its blocks; controls.py: actions and prompts
play.py      on a page; terminal.py: in the terminal; interactive.py: opens the world for either
convert.py   doctor.py

A command is a module of its name with a function of its name, called from Python, and `run(config) -> exit code`, which
prints. One more is such a module, its config, and a line in cli.COMMANDS.
"""
