"""Training of language models on texts: what differs from dialogues."""
