"""What is refused by its kind, before anything runs and whatever `verify` says; and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from activedpo_fast import ActiveDPOSelector, FeatureExtractor, PreferencePool, Prompt, Sketch
from activedpo_fast.errors import ActiveDPOError
from activedpo_fast.gradients.supported import position_limit, require_supported
from activedpo_fast.pool.tokens import TokenizedPool, TokenizedResponse, tokenize_pool
from activedpo_fast.training.generation import generate_responses
from tests.support.gradients import loop_gradients, relative_error, trainable
from tests.support.models import TINY_SIZES, VOCAB_SIZE, lora, tiny_causal_lm, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
POOL = PreferencePool.from_rows(
    [
        {
            "prompt": "What is a sketch? TL;DR:",
            "responses": [" a short random projection", " a drawing"],
        },
        {"prompt": "Name the library. TL;DR:", "responses": [" this one", " the quick brown fox"]},
    ]
)
EXACT = Sketch("none")
SIZES: dict[str, Any] = {**TINY_SIZES, "max_position_embeddings": 64}
ENCODER_DECODER: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=0,
)
LATENT: dict[str, Any] = dict(
    SIZES,
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=4,
    first_k_dense_replace=1,
)
LATENT.pop("head_dim")
EXPERTS: dict[str, Any] = dict(
    SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
)


def tokens(max_length: int | None = None) -> TokenizedPool:
    return tokenize_pool(POOL, TOKENIZER, max_length=max_length)


def a_model(name: str, config: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model.eval()


def adapted(model: PreTrainedModel, targets: Any, **config: Any) -> Any:
    settings = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted.eval()


def assert_refused(model: Any, message: str, *, gradients_only: bool = False) -> None:
    """By every way in, in one line, whether the self-check runs or not."""

    def refused(call: Any) -> None:
        with pytest.raises(ActiveDPOError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    def called(*args: Any) -> None:
        raise AssertionError("the model was run")

    handle = model.register_forward_pre_hook(called)
    refused(lambda: ActiveDPOSelector(model, TOKENIZER, verify=False))
    for verify in (True, False):
        if not gradients_only:
            refused(lambda: FeatureExtractor(model, EXACT, verify=verify))  # noqa: B023
            continue
        extractor = FeatureExtractor(model, EXACT, verify=verify)
        refused(lambda: extractor.check(tokens()))  # noqa: B023
        refused(lambda: extractor.gradients(tokens()))  # noqa: B023
    handle.remove()
    if not gradients_only:
        reference = lora(tiny_causal_lm("llama"), "llama")
        refused(lambda: ActiveDPOSelector(reference, TOKENIZER, strategy="aplp", ref_model=model))
        refused(lambda: FeatureExtractor(reference, EXACT).logps(tokens(), model=model))
        refused(lambda: generate_responses(model, TOKENIZER, [Prompt("a", "The quick")]))
        for strategy in ("apo", "margin_small"):
            refused(lambda: ActiveDPOSelector(model, TOKENIZER, strategy=strategy))  # noqa: B023


def assert_exact(model: Any) -> None:
    expected, logps = loop_gradients(model, tokens().sequences, trainable(model))
    for verify in (True, False):
        found = FeatureExtractor(model, EXACT, beta=1.0, verify=verify).gradients(tokens())
        assert relative_error(found.gradients, expected) < 1e-4
        torch.testing.assert_close(found.logps, logps.double(), rtol=1e-5, atol=0)


BERT: dict[str, Any] = {
    name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")
}
T5: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4
)


@pytest.mark.parametrize(
    ("name", "config", "options", "targets", "task", "message"),
    [
        (
            "BartForSequenceClassification",
            "BartConfig",
            ENCODER_DECODER,
            ["q_proj"],
            None,
            "BartForSequenceClassification is a sequence classifier",
        ),
        (
            "T5ForConditionalGeneration",
            "T5Config",
            T5,
            ["q"],
            "SEQ_CLS",
            "make it with .*SEQ_2_SEQ",
        ),
        ("T5EncoderModel", "T5Config", T5, ["q"], None, "T5EncoderModel"),
        (
            "LlamaForSequenceClassification",
            "LlamaConfig",
            SIZES,
            ["q_proj"],
            None,
            "is a sequence classifier: pass a causal language model",
        ),
        (
            "LlamaForSequenceClassification",
            "LlamaConfig",
            SIZES,
            ["q_proj"],
            "SEQ_CLS",
            "the adapter is for sequence classifiers",
        ),
        (
            "LlamaForTokenClassification",
            "LlamaConfig",
            SIZES,
            ["q_proj"],
            None,
            "a token classifier",
        ),
        ("LlamaForQuestionAnswering", "LlamaConfig", SIZES, ["q_proj"], None, "question answering"),
        (
            "LlamaModel",
            "LlamaConfig",
            SIZES,
            ["q_proj"],
            None,
            "LlamaModel has no language model head",
        ),
        (
            "LlamaForCausalLM",
            "LlamaConfig",
            SIZES,
            ["q_proj"],
            "SEQ_2_SEQ_LM",
            "task_type='CAUSAL_LM'",
        ),
        ("BertForMaskedLM", "BertConfig", BERT, ["query"], None, "a masked language model"),
        ("BertLMHeadModel", "BertConfig", BERT, ["query"], "CAUSAL_LM", "is_decoder=False"),
        ("RobertaForCausalLM", "RobertaConfig", BERT, ["query"], "CAUSAL_LM", "is_decoder=False"),
        (
            "XLMWithLMHeadModel",
            "XLMConfig",
            dict(vocab_size=VOCAB_SIZE, emb_dim=32, n_layers=1, n_heads=2),
            ["q_lin"],
            None,
            "causal=False",
        ),
        (
            "XLNetLMHeadModel",
            "XLNetConfig",
            dict(vocab_size=VOCAB_SIZE, d_model=32, n_layer=1, n_head=2, d_inner=32),
            ["layer_1"],
            None,
            "both sides",
        ),
        (
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            dict(SIZES, use_bidirectional_attention=True),
            ["q_proj"],
            "CAUSAL_LM",
            "use_bidirectional_attention=True",
        ),
    ],
)
def test_kinds_of_model(
    name: str,
    config: str,
    options: dict[str, Any],
    targets: list[str],
    task: str | None,
    message: str,
) -> None:
    assert_refused(adapted(a_model(name, config, **options), targets, task_type=task), message)


def test_a_model_that_its_config_calls_not_causal() -> None:
    model = tiny_causal_lm("llama")
    model.config.is_causal = False
    assert_refused(lora(model, "llama"), "is_causal=False")


@pytest.mark.parametrize(
    ("name", "config", "options", "targets"),
    [
        ("BartForCausalLM", "BartConfig", ENCODER_DECODER, ["q_proj", "fc1"]),
        ("BertLMHeadModel", "BertConfig", dict(BERT, is_decoder=True), ["query"]),
        (
            "GPT2DoubleHeadsModel",
            "GPT2Config",
            dict(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2),
            ["c_attn"],
        ),
        ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT, ["kv_b_proj", "q_a_proj", "o_proj"]),
        ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT, ["kv_b_proj", "q_a_proj"]),
        (
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            EXPERTS,
            ["q_proj", "k_proj", "v_proj", "o_proj"],
        ),
    ],
)
def test_kinds_that_are_exact(
    name: str, config: str, options: dict[str, Any], targets: list[str]
) -> None:
    assert_exact(adapted(a_model(name, config, **options), targets))


def test_a_users_subclass_is_treated_as_its_base_class() -> None:
    class Ours(transformers.LlamaForCausalLM):
        pass

    assert_exact(adapted(Ours(transformers.LlamaConfig(**SIZES)).eval(), ["q_proj"]))


def test_a_vision_language_model_without_images_is_exact() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    model = a_model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SIZES),
        image_token_index=383,
    )
    assert position_limit(model) is None  # the positions of the image are not those of the text
    assert_exact(adapted(model, r".*language_model.*(q_proj|v_proj)"))


def test_activated_lora() -> None:
    model = lora(
        tiny_causal_lm("llama"),
        "llama",
        alora_invocation_tokens=tokens().sequences[0].input_ids[3:5],
    )
    assert_refused(model, "Activated LoRA.*alora_invocation_tokens")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_counted(kind: Any) -> None:
    model = get_peft_model(
        tiny_causal_lm("llama"), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    extractor = FeatureExtractor(model, EXACT)
    last = [
        model(
            input_ids=(ids := torch.tensor([sequence.input_ids])),
            attention_mask=torch.ones_like(ids),
            output_hidden_states=True,
        ).hidden_states[-1][0, -1]
        for sequence in tokens().sequences
    ]
    torch.testing.assert_close(extractor.hidden(tokens()), torch.stack(last).detach())


# -- where the weights are ------------------------------------------------------------------------


def test_wrappers_name_what_to_pass_instead() -> None:
    model = lora(tiny_causal_lm("llama"), "llama")
    assert_refused(torch.nn.DataParallel(model), r"wrapped in DataParallel: .*`\.module`")
    assert_refused(torch.compile(model, backend="eager"), r"OptimizedModule: .*`\._orig_mod`")


@pytest.fixture()
def alone() -> Any:
    """A process group with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_shards(alone: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = lora(tiny_causal_lm("llama"), "llama")
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model.get_base_model().get_decoder().layers[1], mesh=mesh)
    assert_refused(model, r"layers\.1\.\S+ is sharded over processes \(a DTensor")


def test_ddp(alone: Any) -> None:
    wrapped = torch.nn.parallel.DistributedDataParallel(lora(tiny_causal_lm("llama"), "llama"))
    assert_refused(wrapped, r"DistributedDataParallel: .*`\.module`")


def test_zero_3_shards_and_empty_placeholders() -> None:
    """Parameters as DeepSpeed, which is not a test dependency, leaves them: empty, with `ds_id` and
    `ds_shape`."""
    for attributes in ({"ds_id": 3, "ds_shape": torch.Size([32, 32])}, {}):
        model = lora(tiny_causal_lm("llama"), "llama")
        weight = model.get_base_model().get_decoder().layers[0].mlp.gate_proj.weight
        weight.data = torch.empty(0)
        for name, value in attributes.items():
            setattr(weight, name, value)
        assert_refused(model, "gate_proj.*" + ("ZeRO-3" if attributes else "is empty"))


def test_weights_on_disk(tmp_path: Any) -> None:
    from accelerate import disk_offload

    model = tiny_causal_lm("llama")
    disk_offload(model, str(tmp_path))
    assert_refused(model, "on the meta device: its weights are offloaded")


def test_tensor_parallelism() -> None:
    """Each process would compute the gradients of its part only. transformers sets `_tp_size`."""
    model = lora(tiny_causal_lm("llama"), "llama")
    model.get_base_model()._tp_size = 2
    assert_refused(model, r"split over 2 processes \(tensor parallelism\)", gradients_only=True)


# -- tokens ---------------------------------------------------------------------------------------


def long_rows(count: int) -> TokenizedPool:
    ids = [5 + n % 300 for n in range(count)]
    return TokenizedPool([TokenizedResponse([*ids[:-1], 7 + n], 5) for n in (0, 1)], [], [0, 0])


@pytest.mark.parametrize(
    ("name", "config", "options", "targets", "limit"),
    [
        (
            "GPT2LMHeadModel",
            "GPT2Config",
            dict(n_embd=32, n_layer=1, n_head=2, n_positions=64),
            ["c_attn"],
            64,
        ),
        (
            "OPTForCausalLM",
            "OPTConfig",
            dict(BERT, ffn_dim=32, word_embed_proj_dim=32),
            ["q_proj"],
            64,
        ),
        ("BartForCausalLM", "BartConfig", ENCODER_DECODER, ["q_proj"], 64),
        ("RobertaForCausalLM", "RobertaConfig", dict(BERT, is_decoder=True), ["query"], 62),
        (
            "GPTJForCausalLM",
            "GPTJConfig",
            dict(n_embd=32, n_layer=1, n_head=2, n_positions=64, rotary_dim=4),
            ["q_proj"],
            64,
        ),
        (
            "MptForCausalLM",
            "MptConfig",
            dict(d_model=32, n_layers=1, n_heads=2, max_seq_len=64),
            ["Wqkv"],
            64,
        ),
        (
            "CTRLLMHeadModel",
            "CTRLConfig",
            dict(n_embd=32, n_layer=1, n_head=2, n_positions=64, dff=32),
            ["Wq"],
            64,
        ),
    ],
)
def test_positions_from_a_table_are_limited(
    name: str, config: str, options: dict[str, Any], targets: list[str], limit: int
) -> None:
    model = adapted(a_model(name, config, **{"vocab_size": VOCAB_SIZE, **options}), targets)
    assert position_limit(model) == limit
    extractor = FeatureExtractor(model, EXACT, verify=False)
    assert bool(extractor.logps(long_rows(limit)).isfinite().all())
    for call in (extractor.gradients, extractor.logps, extractor.hidden, extractor.check):
        with pytest.raises(
            ActiveDPOError,
            match=f"row 0.* has {limit + 1} tokens with its "
            f"prompt, .* has {limit} positions: set max_len",
        ):
            call(long_rows(limit + 1))


def test_rotary_positions_are_not_limited(caplog: pytest.LogCaptureFixture) -> None:
    model = lora(tiny_causal_lm("llama", max_position_embeddings=16), "llama")
    assert position_limit(model) is None
    rows = FeatureExtractor(model, EXACT, beta=1.0).gradients(long_rows(40))
    expected, _ = loop_gradients(model, long_rows(40).sequences, trainable(model))
    assert relative_error(rows.gradients, expected) < 1e-4
    generate_responses(model, TOKENIZER, [Prompt("a", "The quick")], max_completion_length=30)
    assert "the model was made for 16" in caplog.text


def test_tokens_that_the_model_does_not_know() -> None:
    model = lora(tiny_causal_lm("llama", vocab_size=100), "llama")
    with pytest.raises(ActiveDPOError, match="the pad token id 100 is beyond the 100 tokens"):
        FeatureExtractor(model, EXACT, pad_token_id=100)
    with pytest.raises(ActiveDPOError, match="the pad token id -1 is beyond"):
        FeatureExtractor(model, EXACT, pad_token_id=-1)
    extractor = FeatureExtractor(model, EXACT)
    pool = TokenizedPool(
        [TokenizedResponse([5, 6, 7], 1), TokenizedResponse([5, 6, 100], 1)], [], [0, 0]
    )
    for call in (extractor.gradients, extractor.logps, extractor.hidden, extractor.check):
        with pytest.raises(
            ActiveDPOError,
            match="response.* 1.* has the token id 100, beyond the "
            "100 tokens .*resize_token_embeddings",
        ):
            call(pool)
    larger = lora(tiny_causal_lm("llama"), "llama")
    with pytest.raises(ActiveDPOError, match="token id 100"):
        FeatureExtractor(larger, EXACT).logps(pool, model=model)


def test_tokens_that_the_head_does_not_predict() -> None:
    """A prompt may have tokens that are never predicted, such as those of images."""
    model = tiny_causal_lm("llama")
    model.lm_head = torch.nn.Linear(32, 100, bias=False)
    model = lora(model, "llama")
    prompt_only = TokenizedPool(
        [TokenizedResponse([200, 6, 7], 1), TokenizedResponse([200, 6, 9], 1)], [], [0, 0]
    )
    assert FeatureExtractor(model, EXACT).gradients(prompt_only).gradients.any()
    scored = TokenizedPool([TokenizedResponse([200, 6, 100], 1)], [], [0])
    with pytest.raises(ActiveDPOError, match="token id 100, beyond the 100 tokens .* predicts"):
        FeatureExtractor(model, EXACT).gradients(scored)


def test_a_resized_adapter_has_rows_for_the_new_tokens() -> None:
    model = tiny_causal_lm("llama")
    model.resize_token_embeddings(VOCAB_SIZE + 8)
    model = lora(model, "llama", target_modules=["q_proj", "lm_head"])
    require_supported(model, pad_token_id=VOCAB_SIZE + 7, gradients=True)
