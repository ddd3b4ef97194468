"""Which architectures, adapters and bases work, and how exactly: tiny real models, measured."""
