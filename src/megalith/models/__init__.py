"""What is trained: pure modules that know no rank and no run."""
