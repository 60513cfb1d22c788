"""A Moshi that converses, from nothing: voices, a grammar of what is said, dialogues, a codec, a model."""
