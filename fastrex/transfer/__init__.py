"""Transfer: frozen features of an encoder, linear probes on them, and the table of what they reach."""
