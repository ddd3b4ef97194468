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

    Leaving the parameter out would give a gradient with a silently missing block.

    Examples:
        >>> from peft import LoraConfig
        >>> from activedpo_fast import ActiveDPOSelector, UnsupportedParameterError
        >>> activated = LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
        >>> model.add_adapter("activated", activated)
        >>> model.set_adapter("activated")
        >>> try:
        ...     ActiveDPOSelector(model, processing_class=tokenizer)
        ... except UnsupportedParameterError as error:
        ...     print(error)
        base_model.model.model.layers.0.self_attn.q_proj: Activated LoRA is not supported, its
        layers see only the tokens after the invocation; train without alora_invocation_tokens
    """
