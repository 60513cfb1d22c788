"""Dialogues over the network: many callers share the slots of one stream, which one thread steps."""
