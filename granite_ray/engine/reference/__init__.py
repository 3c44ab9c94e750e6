"""The same verbs on transformers: slow, plain, and the oracle for our own engine."""
