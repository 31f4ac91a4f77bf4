"""What is pretrained: a file per task with its row."""
