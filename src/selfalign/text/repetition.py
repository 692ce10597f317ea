"""How far one text repeats itself: banners and menus of a page, spam, a language model's loops."""

from selfalign.text.overlap import ngrams, words

NGRAM = 5


def repetition(text: str) -> float:
    """Share of the word 5-grams of `text` that stood in it before, 0.0..1.0; 0.0 for a text of one 5-gram or less.

    It is 1 − distinct-5 (distinct-n: arXiv 1510.03055). The backtranslation paper (arXiv 2308.06259) drops segments by
    n-gram Jaccard and gives no formula. For a text whose two halves repeat nothing within themselves, a share r
    here is a Jaccard of r / (1 − r) between them: 0.25 is 1/3, and a text that says everything twice has 0.5.
    Unlike a comparison of sentences, it needs no borders, which menus and loops do not have.
    """
    runs = ngrams(words(text), NGRAM)
    return (len(runs) - len(set(runs))) / len(runs) if runs else 0.0
