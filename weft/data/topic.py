"""topic: clients differ in what their texts are about, without any label (topic skew).

Texts are clustered (TF-IDF, latent semantic analysis, k-means) and each cluster is divided as by `dirichlet`.
"""

import warnings
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from weft.core.errors import JobError
from weft.data.dirichlet import divide
from weft.data.records import Record
from weft.data.split import Assignment, Split, column_values, seed32

_TEXT_COLUMNS = ("question", "instruction", "text", "caption")


def topic(
    alpha: Annotated[float, Field(gt=0, le=1e6)],
    clients: Annotated[int, Field(gt=0)],
    topics: Annotated[int, Field(gt=1)] = 10,
    column: Annotated[str, Field(min_length=1)] | None = None,
) -> Split:
    """Divide topics found in the text of `column` among clients: alpha 0.1 is strong skew, 100 nearly none.

    Without `column` the text is a record's question, instruction, text, caption or messages of the user.
    """

    def assign(records: Sequence[Record], seed: int) -> Assignment:
        found = topics_of(records, topics=topics, seed=seed, column=column)
        return divide(found, alpha, clients, 1, seed32(seed, "topic", "shares"))

    return Split(assign)


def topics_of(records: Sequence[Record], *, topics: int, seed: int, column: str | None = None) -> list[int]:
    """Return the topic of each record's text, 0 to `topics` - 1."""
    if topics > len(records):
        raise JobError(f"data.split: {len(records)} records have no {topics} topics. Lower `topics`.")
    texts = [_text(record) for record in records]
    if column is not None:
        texts = column_values(records, column, "data.split.topic.column")
    try:
        return _cluster(texts, topics, seed32(seed, "topic", "clusters"))
    except ValueError:
        raise JobError(
            "data.split: the texts have no words to find topics by. Name another `column` or split."
        ) from None


def _text(record: Record) -> str:
    for name in _TEXT_COLUMNS:
        if isinstance(record.get(name), str):
            return str(record[name])
    turns = record.get("messages") or ()
    return " ".join(str(turn["content"]) for turn in turns if turn["role"] == "user")


def _cluster(texts: Sequence[str], topics: int, seed: int) -> list[int]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # One thread: with several, the order of sums, and so a text between two topics, would vary.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct texts than topics: some topics stay empty
        vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english", max_features=20_000).fit_transform(texts)
        if vectors.shape[1] > 50:
            vectors = normalize(TruncatedSVD(50, random_state=seed).fit_transform(vectors))
        clusters: list[int] = KMeans(topics, n_init=4, random_state=seed).fit_predict(vectors).tolist()
    return clusters
