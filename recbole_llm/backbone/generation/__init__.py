"""Generation of titles: training, decoding and scoring.

A prompt is a row of a :class:`~recbole_llm.prompt.batch.PromptBatch` without out tokens; titles are token ids from
:func:`~recbole_llm.backbone.text.encode_text`. Expensive work is avoided:

* Vocabulary logits (100 thousand numbers per position) are computed only where a token is predicted.
* A prompt's keys and values are computed once. When titles are scored, all candidates of a prompt follow it in one row and
  share them; a mask hides the candidates from each other::

      prompt      p p p p p p                     once
      candidates              a a a b b c c c     attends to  p p p p p p  and to its own candidate
      position    0 1 2 3 4 5 6 7 8 6 7 6 7 8

* A row whose answer is complete leaves the batch; a constrained answer is complete as soon as one candidate is left.

Positions and masks are those of each row, so that neither padding nor the other rows of a batch affect a result, beyond
rounding.
"""

from recbole_llm.backbone.generation.decoding import TitleTrie, greedy
from recbole_llm.backbone.generation.scoring import score_titles
from recbole_llm.backbone.generation.training import TitleFeatures, pooled_states, title_features, title_loss
from recbole_llm.backbone.generation.vocabulary import logits

__all__ = ["TitleFeatures", "TitleTrie", "greedy", "logits", "pooled_states", "score_titles", "title_features", "title_loss"]
