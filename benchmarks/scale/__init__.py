"""A pool of a million prompts on many GPUs: what is counted on paper, and what can be measured."""
