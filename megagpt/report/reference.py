"""What published scaling laws predict, for lines to compare a run with (stdlib only).

All are fits to English web text in nats per token with vocabularies of 32k to 50k: for other
text, or another tokenizer, slopes compare and levels do not.
"""


def frontier(pf_days: float) -> float:
    """Validation loss of the best model for a compute budget: L(C) = 2.57 C^-0.048, C in
    petaflop/s-days without the embeddings (GPT-3, figure 3.1)."""
    return 2.57 * pf_days**-0.048


def kaplan(n: float, tokens: float) -> float:
    """Loss of n parameters (without embeddings) after `tokens`, trained to the end of a schedule
    (Kaplan et al. 2020, equation 1.5 with table 2)."""
    return ((6.4e13 / n) ** (0.076 / 0.103) + 1.8e13 / tokens) ** 0.103


def chinchilla(n: float, tokens: float) -> float:
    """Loss of n parameters after `tokens` (Hoffmann et al. 2022, equation 10)."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / tokens**0.28
