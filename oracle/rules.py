"""The mask that a visibility rule means: the definitions of the rules, written down once more."""

import torch


def rule_mask(rule, T, U, blocks=None, bq=1, bk=1):
    """Who sees whom, [T, U] bool."""
    i = torch.arange(T)[:, None]
    p, j = i + U - T, torch.arange(U)[None, :]
    seen, causal = [], True
    for part in rule.split("+"):
        name, _, numbers = part.partition(":")
        n = [int(x) for x in numbers.split(",")] if numbers else []
        if name == "full":
            causal = False
        elif name == "window":
            seen.append((p - j).abs() < n[0])
        elif name == "sinks":
            seen.append((j < n[0]).expand(T, U))
        elif name == "global":
            g = torch.tensor(n)
            seen.append(torch.isin(p, g) | torch.isin(j, g))
        elif name == "dilated":
            seen.append(((p - j) % n[1] == 0) & ((p - j).abs() < n[0] * n[1]))
        elif name == "strided":
            seen.append(((p - j).abs() < n[0]) | ((p - j) % n[0] == 0))
        elif name == "fixed":
            seen.append((p.div(n[0], rounding_mode="floor") == j.div(n[0], rounding_mode="floor"))
                        | (j % n[0] >= n[0] - n[1]))
        elif name == "chunk":
            seen.append(p.div(n[0], rounding_mode="floor") == j.div(n[0], rounding_mode="floor"))
        elif name == "blocks":
            whole = blocks.bool().repeat_interleave(bq, 0).repeat_interleave(bk, 1)
            seen.append(whole[:T, :U])
        elif name != "causal":
            raise ValueError(part)
    mask = torch.ones(T, U, dtype=torch.bool)
    if seen:
        mask = torch.stack([s.expand(T, U) for s in seen]).any(0)
    return mask & (j <= p) if causal else mask
