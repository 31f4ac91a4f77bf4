"""What a job will cost, known before it starts."""
