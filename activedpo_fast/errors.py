"""Errors meant for the user."""

from __future__ import annotations


class ActiveDPOError(ValueError):
    """Bad input or an unsupported setup, described in one line that names the cause.

    The command line prints only the message and exits with code 2. Of several processes that raise
    it together, the one numbered `said_by` prints it.

    Examples:
        >>> from activedpo_fast import ActiveDPOError, PreferencePool
        >>> try:
        ...     PreferencePool.from_rows([{"prompt": "Why is the sky blue?", "responses": ["Air"]}])
        ... except ActiveDPOError as error:
        ...     print(error)
        row 1: 1 response(s), two or more are needed to form a pair
    """

    said_by = 0


class UnsupportedParameterError(ActiveDPOError):
    """A trainable parameter whose per-sample gradient the library cannot compute.

    Raised before anything is computed: leaving the parameter out would give a gradient with a
    silently missing block.

    Examples:
        >>> from activedpo_fast import ActiveDPOSelector, UnsupportedParameterError
        >>> model.get_input_embeddings().weight.requires_grad = True
        >>> selector = ActiveDPOSelector(model, processing_class=tokenizer)
        >>> try:
        ...     selector.select(pool, 4)
        ... except UnsupportedParameterError as error:
        ...     print(error)
        cannot take per-sample gradients of trainable parameter
        'base_model.model.model.embed_tokens.weight': it belongs to Embedding, not to a linear
        layer; freeze it (requires_grad_(False)) or leave it out of the adapter
    """
