"""Text files, documents, sentences and tokenizers."""
