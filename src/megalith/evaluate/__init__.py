"""What a trained model can do: loss, generation, downstream tasks."""
