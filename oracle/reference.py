"""Every model that tril's configuration can describe, in plain PyTorch and double precision.

An independent formulation: no fused projections, no caches, one head at a time, the mask
materialised. Parameters go by their names in the checkpoint. Reads config.json of the types gpt2,
llama, mistral, qwen2, qwen3, smollm3 and tril.
"""

import math

import torch

from rules import rule_mask

F64 = torch.float64


def layer_mixers(config):
    """What windows and layers without RoPE mean, as tril's texts, one per layer."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"] == "mistral":
        types = ["sliding_attention" if window else "full_attention"] * layers
    else:
        types = config.get("layer_types") or ["full_attention"] * layers
    rope = config.get("no_rope_layers") or [1] * layers
    if config["model_type"] != "smollm3":
        rope = [1] * layers
    return [(f"window:{window}" if t == "sliding_attention" else "causal")
            + ("" if r else " no-position") for t, r in zip(types, rope)]


def mixer(c, layer):
    """A layer's text as a dictionary: what kind, which options, and the mask of each head."""
    m = dict(kind="attention", sinks=False, position=c["position"], softcap=0.0, theta=None, rules={},
             segment=0, keep=0, top=0)
    for word in c["mixers"][layer % len(c["mixers"])].split():
        name, _, value = word.partition("=")
        if word in ("attention", "linear", "recurrence", "memory"):
            m["kind"] = word
        elif word == "learned-sinks":
            m["sinks"] = True
        elif word == "no-position":
            m["position"] = "none" if c["position"] in ("rope", "alibi") else c["position"]
        elif name in ("segment", "keep", "top"):
            m[name] = int(value)
        elif name == "softcap":
            m["softcap"] = float(value)
        elif name == "theta":
            m["theta"] = float(value)
        elif value:  # heads=rule
            first, _, last = name.partition("-")
            for h in range(int(first), int(last or first) + 1):
                m["rules"][h] = value
        else:
            m["rules"] = {h: word for h in range(c["heads"])}
    return m


def normalise(config):
    """The configuration's axes under one set of names, whatever the model type."""
    t = config["model_type"]
    if t == "gpt2":
        d = config["n_embd"] // config["n_head"]
        return dict(
            layers=config["n_layer"], heads=config["n_head"], kv_heads=config["n_head"], d=d,
            norm="layernorm", eps=config["layer_norm_epsilon"], final_norm=True, qk_norm=False,
            ffn="mlp", act=config["activation_function"], position="learned",
            tied=config["tie_word_embeddings"], scale=config["scale_attn_weights"],
            by_layer=config["scale_attn_by_inverse_layer_idx"], rope=None, gpt2=True,
            mixers=["causal"])
    rope = config.get("rope_parameters") or dict(
        config.get("rope_scaling") or {"rope_type": "default"}, rope_theta=config.get("rope_theta"))
    if t == "tril":
        return dict(
            layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"], d=config["head_dim"], norm=config["norm"],
            eps=config["norm_eps"], final_norm=config["final_norm"], qk_norm=config["qk_norm"],
            ffn=config["ffn"], act=config["hidden_act"], position=config["position"],
            tied=config["tie_word_embeddings"], scale=config["scale_attn_weights"],
            by_layer=config["scale_attn_by_inverse_layer_idx"], rope=rope, gpt2=False,
            mixers=config.get("mixers", ["causal"]), context=config["max_position_embeddings"])
    heads = config["num_attention_heads"]
    return dict(
        layers=config["num_hidden_layers"], heads=heads, kv_heads=config["num_key_value_heads"],
        d=config.get("head_dim") or config["hidden_size"] // heads, norm="rmsnorm",
        eps=config["rms_norm_eps"], final_norm=True, qk_norm=t == "qwen3", ffn="gated",
        act=config["hidden_act"], position="rope", tied=config["tie_word_embeddings"], scale=True,
        by_layer=False, rope=rope, gpt2=False, mixers=layer_mixers(config),
        context=config["max_position_embeddings"])


def activation(name, x):
    if name == "relu":
        return torch.clamp(x, min=0)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name in ("silu", "swish"):
        return x / (1 + torch.exp(-x))
    raise ValueError(name)


def norm(c, P, name, x):
    """LayerNorm or RMSNorm over the last dimension; the bias is there if P holds one."""
    if c["norm"] == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + c["eps"]) * P[name + ".weight"]
    return y + P[name + ".bias"] if name + ".bias" in P else y


def linear(P, name, x, transposed=False):
    w = P[name + ".weight"]
    y = x @ (w if transposed else w.T)
    return y + P[name + ".bias"] if name + ".bias" in P else y


def frequencies(c, dims):
    """Angle per position of each pair, and the attention factor."""
    r = c["rope"]
    theta, kind = r["rope_theta"], r.get("rope_type", "default")
    f = [theta ** (-2 * i / dims) for i in range(dims // 2)]
    s = r.get("factor", 1.0)
    if kind == "linear":
        return [x / s for x in f], 1.0
    if kind == "ntk":
        theta *= s ** (dims / (dims - 2))
        return [theta ** (-2 * i / dims) for i in range(dims // 2)], 1.0
    if kind == "llama3":
        low, high = r["low_freq_factor"], r["high_freq_factor"]
        old = r["original_max_position_embeddings"]
        out = []
        for x in f:
            wave = 2 * math.pi / x
            if wave < old / high:
                out.append(x)
            elif wave > old / low:
                out.append(x / s)
            else:
                m = (old / wave - low) / (high - low)
                out.append((1 - m) * x / s + m * x)
        return out, 1.0
    if kind == "yarn":
        old = r["original_max_position_embeddings"]

        def dim_of(turns):
            return dims * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dim_of(r.get("beta_fast", 32))), 0)
        high = min(math.ceil(dim_of(r.get("beta_slow", 1))), dims - 1)
        high = high + 0.001 if high == low else high
        out = []
        for i, x in enumerate(f):
            ramp = min(max((i - low) / (high - low), 0), 1)
            out.append(x / s * ramp + x * (1 - ramp))
        factor = r.get("attention_factor")
        return out, 0.1 * math.log(s) + 1 if factor is None else factor
    assert kind == "default", kind
    return f, 1.0


def rotate(c, x, theta):
    """x [B, T, d]: the pair (i, i + R) of the first 2R channels turns by position times frequency;
    with a theta of its own, unscaled."""
    dims = c["rope"].get("rotary_dim") or c["d"]
    f, factor = frequencies(c, dims)
    if theta:
        f, factor = [theta ** (-2 * i / dims) for i in range(dims // 2)], 1.0
    R = dims // 2
    angle = torch.arange(x.shape[1], dtype=F64)[:, None] * torch.tensor(f, dtype=F64)
    cos, sin = torch.cos(angle) * factor, torch.sin(angle) * factor
    a, b = x[..., :R], x[..., R:dims]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., dims:]], -1)


def slopes(heads):
    """ALiBi (Press 2022), as the paper's code computes them."""

    def power_of_two(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return power_of_two(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return power_of_two(closest) + slopes(2 * closest)[0::2][: heads - closest]


def relative_shift(x):
    """[.., T, R] with columns for distances R-1 .. 0 becomes [.., T, R] with column j for key j of a
    square problem: Transformer-XL's trick of padding and reshaping. Above the diagonal: nonsense."""
    *rest, T, R = x.shape
    x = torch.cat([x.new_zeros(*rest, T, 1), x], -1).reshape(*rest, R + 1, T)
    return x[..., 1:, :].reshape(*rest, T, R)


def recurrence(c, P, h, names, q, k, v, m):
    """A head of Transformer-XL's attention over a whole text, cut into segments."""
    T, d, D = q.shape[1], c["d"], P[names["r"] + ".weight"].shape[1]
    t = torch.arange(T - 1, -1, -1, dtype=F64)[:, None]
    angle = t * 10000 ** (-torch.arange(0, D, 2, dtype=F64) / D)
    r = linear(P, names["r"], torch.cat([torch.sin(angle), torch.cos(angle)], -1))[:, h * d:(h + 1) * d]
    u, w = (P[names[n]][h * d:(h + 1) * d] for n in ("u", "w"))
    s = ((q + u) @ k.transpose(-1, -2) + relative_shift((q + w) @ r.T)) / math.sqrt(d)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    seen = (j <= i) & (j >= i - i % m["segment"] - m["keep"])
    return torch.softmax(s.masked_fill(~seen, -math.inf), -1) @ v


def recalled(c, P, h, names, q, k, v, local, m):
    """A head's local output blended with attention to the best keys before each token's segment."""
    T, out = q.shape[1], []
    k, v, g = k.detach(), v.detach(), torch.sigmoid(P[names["gate"]][h])
    for i in range(T):
        end = i - i % m["segment"]
        begin = max(0, end - m["keep"])
        if end == 0:
            out.append(local[:, i])
            continue
        s = (q[:, i, None] @ k[:, begin:end].transpose(-1, -2))[:, 0] / math.sqrt(c["d"])
        best, at = s.topk(min(m["top"], end - begin), -1)
        rows = torch.stack([v[b, begin:end][at[b]] for b in range(v.shape[0])])
        out.append((1 - g) * local[:, i] + g * (torch.softmax(best, -1)[:, None] @ rows)[:, 0])
    return torch.stack(out, 1)


def attention(c, P, layer, names, x):
    T, H, K, d = x.shape[1], c["heads"], c["kv_heads"], c["d"]
    if c["gpt2"]:
        q, k, v = linear(P, names["qkv"], x, True).split(H * d, -1)
    else:
        q, k, v = (linear(P, names[n], x) for n in "qkv")
    m = mixer(c, layer)
    position = torch.arange(T)
    distance = (position[:, None] - position[None, :]).clamp(min=0)
    out = []
    for h in range(H):
        g = h // (H // K)
        qh, kh, vh = q[..., h * d:(h + 1) * d], k[..., g * d:(g + 1) * d], v[..., g * d:(g + 1) * d]
        if c["qk_norm"]:
            rms = dict(c, norm="rmsnorm")
            qh, kh = norm(rms, P, names["q_norm"], qh), norm(rms, P, names["k_norm"], kh)
        if m["kind"] == "recurrence":
            out.append(recurrence(c, P, h, names, qh, kh, vh, m))
            continue
        plain = qh, kh
        if m["kind"] == "memory":
            m["rules"][h] = f"chunk:{m['segment']}"
        if m["position"] == "rope":
            qh, kh = rotate(c, qh, m["theta"]), rotate(c, kh, m["theta"])
        if m["kind"] == "linear":
            phi = [torch.where(x > 0, x + 1, torch.exp(x)) for x in (qh, kh)]
            w = (phi[0] @ phi[1].transpose(-1, -2)).tril()
            out.append(w / w.sum(-1, keepdim=True) @ vh)
            continue
        s = qh @ kh.transpose(-1, -2)
        if c["scale"]:
            s = s / math.sqrt(d)
        if c["by_layer"]:
            s = s / (layer + 1)
        if m["softcap"]:
            s = m["softcap"] * torch.tanh(s / m["softcap"])
        if m["position"] == "alibi":
            s = s - slopes(H)[h] * distance
        s = s.masked_fill(~rule_mask(m["rules"].get(h, "causal"), T, T), -math.inf)
        sink = P[names["sinks"]][h] if m["sinks"] else torch.tensor(-math.inf, dtype=F64)
        top = torch.maximum(s.amax(-1, keepdim=True), sink)
        e = torch.exp(s - top)
        out.append(e / (e.sum(-1, keepdim=True) + torch.exp(sink - top)) @ vh)
        if m["kind"] == "memory":
            out[-1] = recalled(c, P, h, names, *plain, vh, out[-1], m)
    return linear(P, names["o"], torch.cat(out, -1), c["gpt2"])


def forward(config, P, ids):
    """Logits [B, T, V] in double. P: name -> tensor (double)."""
    c = normalise(config)
    gpt2 = c["gpt2"]
    embed = "transformer.wte" if gpt2 else "model.embed_tokens"
    positions = "transformer.wpe" if gpt2 else "model.embed_positions"
    x = P[embed + ".weight"][ids]
    if c["position"] == "learned":
        x = x + P[positions + ".weight"][: ids.shape[1]]
    for i in range(c["layers"]):
        p = f"transformer.h.{i}." if gpt2 else f"model.layers.{i}."
        if gpt2:
            names = dict(qkv=p + "attn.c_attn", o=p + "attn.c_proj")
        else:
            names = {n: p + f"self_attn.{n}_proj" for n in "qkvo"}
            names.update(r=p + "self_attn.r_proj", u=p + "self_attn.content_bias",
                         w=p + "self_attn.position_bias", gate=p + "self_attn.memory_gate")
            names.update(sinks=p + "self_attn.sinks", q_norm=p + "self_attn.q_norm", k_norm=p + "self_attn.k_norm")
        n1, n2 = ("ln_1", "ln_2") if gpt2 else ("input_layernorm", "post_attention_layernorm")
        x = x + attention(c, P, i, names, norm(c, P, p + n1, x))
        if c["ffn"] == "none":
            continue
        y = norm(c, P, p + n2, x)
        if gpt2:
            y = activation(c["act"], linear(P, p + "mlp.c_fc", y, True))
            y = linear(P, p + "mlp.c_proj", y, True)
        elif c["ffn"] == "mlp":
            y = activation(c["act"], linear(P, p + "mlp.up_proj", y))
            y = linear(P, p + "mlp.down_proj", y)
        else:
            gate = activation(c["act"], linear(P, p + "mlp.gate_proj", y))
            y = linear(P, p + "mlp.down_proj", gate * linear(P, p + "mlp.up_proj", y))
        x = x + y
    if c["final_norm"]:
        x = norm(c, P, "transformer.ln_f" if gpt2 else "model.norm", x)
    return x @ P[(embed if c["tied"] else "lm_head") + ".weight"].T


def next_token_loss(logits, ids):
    """Mean over all positions with a successor, in nats."""
    x = logits[:, :-1]
    x = x - x.amax(-1, keepdim=True)
    log_p = x - torch.log(torch.exp(x).sum(-1, keepdim=True))
    return -log_p.gather(-1, ids[:, 1:, None]).mean()
