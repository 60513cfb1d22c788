"""Training of speech-language models on recordings, questions and answers: what differs from texts."""
