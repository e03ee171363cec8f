"""What every family of benchmarks shares: cases, clocks, records, verdicts."""
