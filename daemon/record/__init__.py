"""What is kept: journal, ledger, rejected frames, metrics."""
