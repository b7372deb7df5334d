"""What is checked when a Hugging Face model is imported: files, configuration, log-probabilities."""
