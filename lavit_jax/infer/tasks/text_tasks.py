"""Tasks of class LaVIT that generate text: caption, answer, write."""

from collections.abc import Callable, Sequence

import numpy as np

from lavit_jax.core import errors
from lavit_jax.infer import ranges, text_generation
from lavit_jax.infer.presets import official, rules
from lavit_jax.infer.prompts import wording
from lavit_jax.infer.tasks import arguments, model


class TextTasks(model.LoadedModel):
  """Texts about images, and after prompts of text and images.

  All methods share these arguments, and `rules.TextGenerationConfig` says what
  they mean: num_beams, min_new_tokens, max_new_tokens, length_penalty,
  early_stopping, length_offset. None: as the model's preset says.
  """

  def caption(
    self,
    images: arguments.Images,
    *,
    prompt: str = "",
    parity: bool = False,
    seed: int | None = None,
    num_beams: int | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    length_offset: int | None = None,
  ) -> str | list[str]:
    """Describes images.

    Args:
      images: one or a list.
      prompt: how every caption begins; it is not repeated in the result.
      parity: as the official code, see the head of `pipeline.py`.
      seed: sample the patches that are read; None is deterministic.
      num_beams: see the class, as for all arguments below.
      min_new_tokens: shortest text.
      max_new_tokens: longest text.
      length_penalty: of beams.
      early_stopping: of beams.
      length_offset: of beams.

    Returns:
      A caption, or a list of captions for a list of images.
    """
    options = arguments.fields_of(rules.TextGenerationConfig, locals())
    arguments.require_text("prompt", prompt)
    batch, single = self._batch(images, parity)
    clean: Callable[[str], str] = str.strip
    if parity or self.rules.short:
      clean = official.clean_caption if parity else wording.first_sentence
    texts = text_generation.write(
      self._prompter,
      [[image, prompt] if prompt else [image] for image in batch],
      rules.changed(self.rules.caption, options),
      seeds=arguments.seeds(seed, parity, len(batch)),
      parity=parity,
    )
    captions = [clean(row[0].text) for row in texts]
    return captions[0] if single else captions

  def answer(
    self,
    images: arguments.Images,
    questions: str | Sequence[str],
    *,
    answerable_first: bool = False,
    lemmatize: bool = False,
    parity: bool = False,
    seed: int | None = None,
    num_beams: int | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    length_offset: int | None = None,
  ) -> str | list[str]:
    """Answers questions about images.

    Takes one image and several questions, or as many of one as of the other.
    (The official evaluation applies `official.clean_question` before.)

    Args:
      images: one or a list.
      questions: one or a list.
      answerable_first: first ask whether each question can be answered, as
        the VizWiz protocol does. If the model says no, the answer is
        "unanswerable".
      lemmatize: give words in their base form (`wording.lemmatize`).
      parity: as the official code, see the head of `pipeline.py`.
      seed: sample the patches that are read; None is deterministic.
      num_beams: see the class, as for all arguments below.
      min_new_tokens: shortest answer.
      max_new_tokens: longest answer.
      length_penalty: of beams.
      early_stopping: of beams.
      length_offset: of beams.

    Returns:
      An answer, or a list of answers for a list of questions.

    Raises:
      errors.UsageError: the numbers of images and questions do not match.
    """
    options = arguments.fields_of(rules.TextGenerationConfig, locals())
    batch, texts, single = self._paired(images, questions, parity)
    config = rules.changed(self.rules.answer, options)
    seeds = arguments.seeds(seed, parity, len(texts))

    def ask(indices, prompt):
      written = text_generation.write(
        self._prompter,
        [[batch[i], prompt(texts[i])] for i in indices],
        config,
        seeds=None if seeds is None else seeds[indices],
        parity=parity,
      )
      return [self._shortened(row[0].text, parity) for row in written]

    indices = list(range(len(texts)))
    answers = [wording.UNANSWERABLE] * len(texts)
    if answerable_first:
      verdicts = ask(indices, wording.answerable_prompt)
      indices = [i for i in indices if not verdicts[i].lower().startswith("no")]
    if indices:
      found = ask(indices, wording.question_prompt)
      for i, answer in zip(indices, found, strict=True):
        answers[i] = wording.lemmatize(answer) if lemmatize else answer
    return answers[0] if single else answers

  def write(
    self,
    prompts: Sequence[arguments.Prompt],
    *,
    count: int = 1,
    parity: bool = False,
    seed: int | None = None,
    num_beams: int | None = None,
    min_new_tokens: int | None = None,
    max_new_tokens: int | None = None,
    length_penalty: float | None = None,
    early_stopping: bool | str | None = None,
    length_offset: int | None = None,
  ) -> list[list[text_generation.Text]]:
    """Continues prompts of text and images with text.

    Args:
      prompts: each a str, or a list of str (text) and images.
      count: texts for each prompt; more than one needs at least as many beams.
      parity: as the official code, see the head of `pipeline.py`.
      seed: sample the patches that are read; None is deterministic.
      num_beams: see the class, as for all arguments below. The preset is that
        of captions.
      min_new_tokens: shortest text.
      max_new_tokens: longest text.
      length_penalty: of beams.
      early_stopping: of beams.
      length_offset: of beams.

    Returns:
      For each prompt `count` texts, uncut, with their scores, the best first.
    """
    options = arguments.fields_of(rules.TextGenerationConfig, locals())
    ranges.check_sequence("prompts", prompts, "prompts")
    return text_generation.write(
      self._prompter,
      prompts,
      rules.changed(self.rules.caption, options),
      seeds=arguments.seeds(seed, parity, len(prompts)),
      parity=parity,
      count=count,
    )

  def _paired(self, images, questions, parity):
    """Returns images, as many questions, and whether it was one question."""
    single = isinstance(questions, str)
    texts = [questions] if single else questions
    if not isinstance(texts, Sequence):
      arguments.require_text("question", texts)
    for text in texts:
      arguments.require_text("question", text)
    batch, _ = self._batch(images, parity)
    if len(batch) == 1:
      batch = np.repeat(batch, len(texts), axis=0)
    if len(batch) != len(texts) or not texts:
      raise errors.UsageError(
        f"{len(batch)} images and {len(texts)} questions: give one question"
        " for each image, or several about one image."
      )
    return batch, texts, single

  def _shortened(self, text, parity):
    if parity:
      return official.clean_answer(text).strip()
    return wording.short_answer(text) if self.rules.short else text.strip()
