"""Writes the golden files of tests/golden: see README.md beside this file.

usage: make_goldens.py DIR [--transformers-only]

--transformers-only writes only config/<version>/: what this version of transformers saves.
"""

import json
import math
import os
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

import reference

F64 = torch.float64


class DoubleTorch:
    """torch, except that float32 means float64: for modules that compute in fp32 on their own."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def make_double():
    from transformers import modeling_rope_utils
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.smollm3 import modeling_smollm3

    modules = [modeling_rope_utils, modeling_llama, modeling_mistral, modeling_qwen2,
               modeling_qwen3, modeling_smollm3]
    for m in modules:
        m.torch = DoubleTorch()
        if hasattr(m, "nn"):
            softmax = torch.nn.functional.softmax
            m.nn = type("nn", (), {"__getattr__": lambda self, n: getattr(torch.nn, n)})()
            m.nn.functional = type(
                "F", (), {"__getattr__": lambda self, n: getattr(torch.nn.functional, n)})()
            m.nn.functional.softmax = lambda x, dim, dtype=None: softmax(x, dim=dim)


def randomise(tensors, seed):
    """Values that leave nothing at a special point: no zero biases, no unit gains."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name, t in sorted(tensors.items()):
        r = torch.randn(t.shape, generator=g)
        if t.dim() == 2:
            embedding = "embed" in name or ".wte." in name or ".wpe." in name
            out[name] = r * (0.4 if embedding else 0.8 / math.sqrt(t.shape[-1]))
        else:
            out[name] = 0.1 * r if name.endswith("bias") else 1 + 0.2 * r
    return out


def double_parameters(tensors):
    return {n: t.to(F64).requires_grad_() for n, t in tensors.items()}


def ids_of(seed, vocab, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, shape, generator=g)


def golden(config, tensors, seed, vocab, out, model=None):
    """logits, loss and gradients; from `model` (transformers, double) where there is one, and then
    reference.py must agree."""
    ids = ids_of(seed, vocab, 2, 20)
    P = double_parameters(tensors)
    logits = reference.forward(config, P, ids)
    loss = reference.next_token_loss(logits, ids)
    loss.backward()
    grads = {n: p.grad for n, p in P.items()}
    if model is not None:
        theirs = model(input_ids=ids).logits
        assert theirs.dtype == F64
        their_loss = torch.nn.functional.cross_entropy(
            theirs[:, :-1].reshape(-1, vocab), ids[:, 1:].reshape(-1))
        their_loss.backward()
        error = (theirs - logits).abs().max().item()
        worst = max((p.grad - grads[n]).abs().max().item() for n, p in model.named_parameters())
        print(f"  reference - transformers: logits {error:.1e}, gradients {worst:.1e}")
        assert error < 1e-10 and worst < 1e-10
        logits, loss = theirs, their_loss
        grads = {n: p.grad for n, p in model.named_parameters()}
    data = {"ids": ids.to(torch.int32), "logits": logits.detach().float(),
            "loss": loss.detach().reshape(1)}
    data.update({"grad." + n: g.float() for n, g in grads.items()})
    save_file({n: t.contiguous() for n, t in data.items()}, os.path.join(out, "golden.safetensors"))


STEPS, LR, WARMUP, DECAY = 10, 3e-3, 2, 0.1


def rate(t):
    """docs/training.md: linear warm-up, then cosine to a tenth."""
    if t < WARMUP:
        return LR * (t + 1) / WARMUP
    u = (t - WARMUP) / max(1, STEPS - WARMUP)
    return LR / 10 + (LR - LR / 10) * 0.5 * (1 + math.cos(math.pi * u))


def ten_steps(config, tensors, seed, vocab, out, clip):
    """torch.optim.AdamW in double: decay on matrices and embeddings only, global-norm clipping."""
    P = double_parameters(tensors)
    groups = [{"params": [p for p in P.values() if p.dim() == 2], "weight_decay": DECAY},
              {"params": [p for p in P.values() if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    batches = ids_of(seed, vocab, STEPS, 2, 16)
    losses, norms = [], []
    for t in range(STEPS):
        for g in adamw.param_groups:
            g["lr"] = rate(t)
        adamw.zero_grad()
        loss = reference.next_token_loss(reference.forward(config, P, batches[t]), batches[t])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(P.values(), clip)))
        losses.append(loss.item())
        adamw.step()
    print(f"  ten steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}, norm {min(norms):.2f} .. "
          f"{max(norms):.2f}")
    assert min(norms) < clip < max(norms)  # some steps are clipped, some are not
    data = {"ids": batches.to(torch.int32), "loss": torch.tensor(losses, dtype=F64),
            "norm": torch.tensor(norms, dtype=F64),
            "rate": torch.tensor([rate(t) for t in range(STEPS)], dtype=F64),
            "clip": torch.tensor([clip], dtype=F64)}
    data.update({"final." + n: p.detach().float().contiguous() for n, p in P.items()})
    save_file(data, os.path.join(out, "steps.safetensors"))


def transformers_golden(name, config, seed, root, clip=None):
    out = os.path.join(root, "models", name)
    os.makedirs(out, exist_ok=True)
    print(name)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval()  # parameters in fp32; what make_double made double stays
    values = randomise(dict(model.named_parameters()), seed)
    model.load_state_dict(values, strict=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(os.path.join(folder, "model.safetensors"))
        saved = json.load(open(os.path.join(folder, "config.json")))
        for f in ("config.json", "model.safetensors"):
            os.replace(os.path.join(folder, f), os.path.join(out, f))
    assert all(torch.equal(tensors[n], v) for n, v in values.items() if n in tensors)
    double = model.to(F64)
    double.zero_grad()
    golden(saved, tensors, seed + 1, config.vocab_size, out, double)
    if clip:
        ten_steps(saved, tensors, seed + 2, config.vocab_size, out, clip)


def tril_golden(name, config, shapes, seed, root):
    out = os.path.join(root, "models", name)
    os.makedirs(out, exist_ok=True)
    print(name)
    tensors = randomise({n: torch.empty(s) for n, s in shapes.items()}, seed)
    json.dump(config, open(os.path.join(out, "config.json"), "w"), indent=2)
    save_file(tensors, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    golden(config, tensors, seed + 1, config["vocab_size"], out)


def tril_config(**changes):
    config = dict(
        architectures=["TrilForCausalLM"], model_type="tril", vocab_size=83,
        max_position_embeddings=24, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=6, hidden_act="silu",
        norm="layernorm", norm_eps=1e-5, norm_bias=True, final_norm=True, qk_norm=False,
        ffn="gated", ffn_bias=False, position="learned", qkv_bias=False, attention_out_bias=False,
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, embd_pdrop=0.0,
        attn_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=True, initializer_range=0.02,
        bos_token_id=None, eos_token_id=None, dtype="float32")
    config.update(changes)
    return config


def tril_shapes(c):
    """Names and shapes of a tril-type checkpoint, by docs/formats.md."""
    D, V, d = c["hidden_size"], c["vocab_size"], c["head_dim"]
    A, K, F = c["num_attention_heads"] * d, c["num_key_value_heads"] * d, c["intermediate_size"]
    s = {"model.embed_tokens.weight": (V, D)}

    def norm(name):
        s[name + ".weight"] = (D,)
        if c["norm_bias"]:
            s[name + ".bias"] = (D,)

    def linear(name, o, i, bias):
        s[name + ".weight"] = (o, i)
        if bias:
            s[name + ".bias"] = (o,)

    if c["position"] == "learned":
        s["model.embed_positions.weight"] = (c["max_position_embeddings"], D)
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        norm(p + "input_layernorm")
        for n, o in (("q", A), ("k", K), ("v", K)):
            linear(p + f"self_attn.{n}_proj", o, D, c["qkv_bias"])
        linear(p + "self_attn.o_proj", D, A, c["attention_out_bias"])
        if c["qk_norm"]:
            s[p + "self_attn.q_norm.weight"] = s[p + "self_attn.k_norm.weight"] = (d,)
        mixer = c.get("mixers", [""])[i % len(c.get("mixers", [""]))]
        if "recurrence" in mixer:
            linear(p + "self_attn.r_proj", A, D, False)
            s[p + "self_attn.content_bias"] = s[p + "self_attn.position_bias"] = (A,)
        if "memory" in mixer:
            s[p + "self_attn.memory_gate"] = (c["num_attention_heads"],)
        if "learned-sinks" in c.get("mixers", [""])[i % len(c.get("mixers", [""]))]:
            s[p + "self_attn.sinks"] = (c["num_attention_heads"],)
        if c["ffn"] == "none":
            continue
        norm(p + "post_attention_layernorm")
        if c["ffn"] == "gated":
            linear(p + "mlp.gate_proj", F, D, c["ffn_bias"])
        linear(p + "mlp.up_proj", F, D, c["ffn_bias"])
        linear(p + "mlp.down_proj", D, F, c["ffn_bias"])
    if c["final_norm"]:
        norm("model.norm")
    if not c["tie_word_embeddings"]:
        s["lm_head.weight"] = (V, D)
    return s


def model_goldens(root):
    T = transformers
    transformers_golden("gpt2-tiny", T.GPT2Config(
        vocab_size=83, n_positions=24, n_embd=24, n_layer=2, n_head=3), 100, root, clip=3.5)
    transformers_golden("gpt2-scaled", T.GPT2Config(
        vocab_size=29, n_positions=20, n_embd=12, n_layer=2, n_head=2, n_inner=20,
        activation_function="gelu", scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False), 200, root)
    transformers_golden("llama-tiny", T.LlamaConfig(
        vocab_size=83, max_position_embeddings=24, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5,
        tie_word_embeddings=True), 300, root, clip=6.0)
    llama3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0,
                  high_freq_factor=2.5, original_max_position_embeddings=12)
    transformers_golden("llama-gqa-untied", T.LlamaConfig(
        vocab_size=83, max_position_embeddings=48, hidden_size=24, intermediate_size=36,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        attention_bias=True, mlp_bias=True, rope_parameters=llama3), 400, root)
    transformers_golden("mistral-tiny", T.MistralConfig(
        vocab_size=29, max_position_embeddings=24, hidden_size=14, intermediate_size=20,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
        sliding_window=None, hidden_act="gelu_pytorch_tanh"), 500, root)
    transformers_golden("qwen2-tiny", T.Qwen2Config(
        vocab_size=29, max_position_embeddings=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1), 600, root)
    transformers_golden("qwen3-tiny", T.Qwen3Config(
        vocab_size=29, max_position_embeddings=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8), 700, root)
    transformers_golden("mistral-window", T.MistralConfig(
        vocab_size=29, max_position_embeddings=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, sliding_window=5),
        800, root)
    transformers_golden("qwen3-window", T.Qwen3Config(
        vocab_size=29, max_position_embeddings=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        use_sliding_window=True, sliding_window=4, max_window_layers=1), 900, root)
    transformers_golden("smollm3-tiny", T.SmolLM3Config(
        vocab_size=29, max_position_embeddings=24, hidden_size=12, intermediate_size=20,
        num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        pad_token_id=None, bos_token_id=None, eos_token_id=None), 950, root)
    tril = {
        "model3-tiny": tril_config(
            vocab_size=211, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=16, ffn="none", intermediate_size=0, hidden_act=None,
            final_norm=False),
        "alibi-tiny": tril_config(
            vocab_size=29, num_attention_heads=3, num_key_value_heads=1, position="alibi",
            norm_bias=False, qkv_bias=True, attention_out_bias=True, ffn_bias=True,
            hidden_act="gelu_pytorch_tanh", tie_word_embeddings=False),
        "mixed-tiny": tril_config(
            vocab_size=29, norm="rmsnorm", norm_bias=False, qk_norm=True, ffn="mlp",
            hidden_act="relu", position="rope", num_key_value_heads=2,
            rope_parameters=dict(rope_type="yarn", rope_theta=100.0, factor=4.0, rotary_dim=4,
                                 attention_factor=1.2, beta_fast=2.0, beta_slow=0.25,
                                 original_max_position_embeddings=8)),
        "mixers-tiny": tril_config(
            vocab_size=29, norm="rmsnorm", norm_bias=False, position="rope", num_hidden_layers=4,
            num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=100.0),
            mixers=["linear", "0=window:3+sinks:1 1-2=strided:4 3=causal learned-sinks",
                    "dilated:3,2 softcap=1.5 theta=30", "fixed:5,2 no-position"]),
        "alibi-hybrid": tril_config(
            vocab_size=29, num_attention_heads=6, head_dim=4, num_key_value_heads=3,
            position="alibi", norm_bias=False, num_hidden_layers=3,
            mixers=["chunk:6 learned-sinks", "linear", "window:8 softcap=2"]),
        "recurrence-tiny": tril_config(
            vocab_size=29, position="none", num_key_value_heads=2, qkv_bias=True, ffn="none",
            intermediate_size=0, hidden_act=None,
            mixers=["recurrence segment=7 keep=9", "recurrence segment=7 keep=9"]),
        "memory-tiny": tril_config(
            vocab_size=29, position="rope", norm="rmsnorm", norm_bias=False,
            rope_parameters=dict(rope_type="default", rope_theta=100.0),
            mixers=["memory segment=6 keep=10 top=3", "recurrence segment=6 keep=5"]),
    }
    for i, (name, config) in enumerate(tril.items()):
        tril_golden(name, config, tril_shapes(config), 1000 + 100 * i, root)


def rope_golden(root):
    """What transformers makes of each rope type: frequencies in double, and the attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    cases = []
    for head_dim, context, rope in (
            (64, 2048, dict(rope_type="default", rope_theta=10000.0)),
            (48, 2048, dict(rope_type="linear", rope_theta=10000.0, factor=2.5)),
            (64, 2048, dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)),
            (64, 131072, dict(rope_type="llama3", rope_theta=500000.0, factor=32.0,
                              low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192)),
            (128, 32768, dict(rope_type="yarn", rope_theta=1000000.0, factor=4.0,
                              original_max_position_embeddings=8192)),
            (64, 4096, dict(rope_type="yarn", rope_theta=10000.0, factor=16.0, beta_fast=24.0,
                            beta_slow=2.0, original_max_position_embeddings=256, mscale=1.0,
                            mscale_all_dim=0.7)),
            (32, 512, dict(rope_type="yarn", rope_theta=150000.0, factor=2.0,
                           attention_factor=1.5, original_max_position_embeddings=256))):
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=2 * head_dim, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=context, rope_parameters=dict(rope))
        embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        cases.append(dict(config=json.loads(config.to_json_string()),
                          frequencies=embedding.inv_freq.tolist(),
                          attention_factor=embedding.attention_scaling))
    # Dynamic NTK beyond the context it was trained for.
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=128, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=1024,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0))
    f, factor = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=4096)
    cases.append(dict(config=json.loads(config.to_json_string()), positions=4096,
                      frequencies=f.tolist(), attention_factor=factor))
    alibi = {str(h): reference.slopes(h) for h in (1, 2, 3, 8, 12, 20, 25, 64)}
    with open(os.path.join(root, "rope.json"), "w") as f:
        json.dump(dict(rope=cases, alibi=alibi), f)


def config_goldens(root):
    """config.json as this version of transformers writes it, for the tests of the reader."""
    T = transformers
    out = os.path.join(root, "config", "transformers-" + T.__version__.split(".")[0])
    os.makedirs(out, exist_ok=True)
    five = int(T.__version__.split(".")[0]) >= 5

    def rope(theta, **more):
        if five:
            return dict(rope_parameters=dict(more or dict(rope_type="default"), rope_theta=theta))
        return dict(rope_theta=theta, rope_scaling=more or None)

    small = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=64)
    configs = {
        "gpt2": T.GPT2Config(),
        "gpt2-changed": T.GPT2Config(
            vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=24,
            activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.05, attn_pdrop=0.2,
            layer_norm_epsilon=1e-6, scale_attn_weights=False, tie_word_embeddings=False,
            scale_attn_by_inverse_layer_idx=True, bos_token_id=3, eos_token_id=None),
        "llama": T.LlamaConfig(**small),
        "llama-changed": T.LlamaConfig(
            **small, num_key_value_heads=2, head_dim=6, attention_bias=True, mlp_bias=True,
            attention_dropout=0.1, rms_norm_eps=1e-5, tie_word_embeddings=True, hidden_act="gelu",
            eos_token_id=[5, 6], **rope(1000.0, rope_type="linear", factor=2.0)),
        "llama3": T.LlamaConfig(**small, **rope(
            500000.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)),
        "yarn": T.LlamaConfig(**small, **rope(
            10000.0, rope_type="yarn", factor=2.0, original_max_position_embeddings=32)),
        "mistral": T.MistralConfig(**small, num_key_value_heads=2, sliding_window=None),
        "mistral-window": T.MistralConfig(**small, num_key_value_heads=2, sliding_window=16),
        "qwen2": T.Qwen2Config(**small, num_key_value_heads=2),
        "qwen2-window": T.Qwen2Config(**small, num_key_value_heads=2, use_sliding_window=True,
                                      sliding_window=16, max_window_layers=1),
        "qwen3": T.Qwen3Config(**small, num_key_value_heads=2, head_dim=8),
        "smollm3": T.SmolLM3Config(
            **small, num_key_value_heads=2, use_sliding_window=True, sliding_window=16,
            no_rope_layers=[1, 0], pad_token_id=None, bos_token_id=None, eos_token_id=None,
            **rope(5000.0)),
    }
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            os.replace(os.path.join(folder, "config.json"), os.path.join(out, name + ".json"))


def main():
    root = sys.argv[1]
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config_goldens(root)
    if "--transformers-only" in sys.argv:
        return
    make_double()
    torch.set_num_threads(1)
    model_goldens(root)
    rope_golden(root)


if __name__ == "__main__":
    main()
