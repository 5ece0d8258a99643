"""PyTorch's side: transformers' `generate`, and a tokenizer of plain modules.

As fast as these are without a compiler: SDPA, inference mode, a cache, and
suppressed ids by one masked fill. transformers' own `suppress_tokens` looks
every id of the vocabulary up in the list of the suppressed at every token,
which has nothing to do with the model and would flatter us.
"""

import contextlib
import functools
import importlib.metadata
import pathlib

import numpy as np
import torch
import transformers

from side_by_side import cases, torch_tokenizer

_TOP = 25  # operations that a profile lists


class Forbid(transformers.LogitsProcessor):
  """Rules ids out: `banned` bool[V]."""

  def __init__(self, banned):
    self._banned = torch.from_numpy(banned)

  def __call__(self, input_ids, scores):
    """Scores float[B, V], -inf at what is banned."""
    return scores.masked_fill(self._banned, -torch.inf)


class Side:
  """The work of each case, as calls that begin and end in numpy."""

  def __init__(self, folder, sizes: cases.Sizes, threads: int):
    """Nothing is loaded before a case needs it."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    self._folder = pathlib.Path(folder) / "hf"
    self._sizes = sizes

  def versions(self) -> dict[str, str]:
    """Of the libraries that compute."""
    return {x: importlib.metadata.version(x) for x in ("torch", "transformers")}

  def work(self, case: cases.Case, batch: int):
    """What is timed: a function of no arguments that gives numpy arrays."""
    makers = {
      "beam": functools.partial(self._beam, scores=False),
      "draw": functools.partial(self._draw, greedy=False),
      "tokenize": self._tokenize,
    }
    return torch.inference_mode()(makers[case.kind](case, batch))

  def judged(self, case: cases.Case, batch: int):
    """Beams with scores, drawing without chance; None where work serves."""
    makers = {
      "beam": functools.partial(self._beam, scores=True),
      "draw": functools.partial(self._draw, greedy=True),
    }
    if case.kind not in makers:
      return None
    return torch.inference_mode()(makers[case.kind](case, batch))

  @contextlib.contextmanager
  def profile(self, directory):
    """Writes a summary of operations."""
    with torch.profiler.profile() as profile:
      yield
    table = profile.key_averages().table("self_cpu_time_total", row_limit=_TOP)
    (pathlib.Path(directory) / "summary.txt").write_text(table)

  @functools.cached_property
  def _llm(self):
    return transformers.LlamaForCausalLM.from_pretrained(
      self._folder / "llm",
      dtype=torch.float32,
      attn_implementation="sdpa",
    ).eval()

  @functools.cached_property
  def _tokenizer(self):
    return torch_tokenizer.load(self._folder)

  def _settings(self, case):
    """Arguments of `generate` that all cases have."""
    eos_id = cases.eos_id(case, self._sizes)
    return {
      "max_new_tokens": case.new_tokens,
      "min_new_tokens": case.new_tokens,
      "eos_token_id": eos_id,
      "pad_token_id": eos_id,
      "logits_processor": transformers.LogitsProcessorList(
        [Forbid(cases.suppressed(case, self._sizes))]
      ),
      "return_dict_in_generate": True,
    }

  def _beam(self, case, batch, scores):
    model, settings = self._llm, self._settings(case)
    embeds = cases.embeds(case, self._sizes, batch)

    def run():
      found = model.generate(
        inputs_embeds=torch.from_numpy(embeds),
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        do_sample=False,
        num_beams=case.num_beams,
        length_penalty=case.length_penalty,
        early_stopping=case.early_stopping,
        output_scores=scores,  # copies those of every step: not timed
        **settings,
      )
      arrays = {"ids": found.sequences.numpy()}
      if scores:
        arrays["scores"] = found.sequences_scores.numpy()
      return arrays

    return run

  def _draw(self, case, batch, greedy):
    model, settings = self._llm, self._settings(case)
    ids = cases.drawing_prompt(case, self._sizes, batch)
    if not greedy:
      settings |= {"top_k": cases.TOP_K, "top_p": 1.0, "temperature": 1.0}

    def run():
      prompt = torch.from_numpy(ids).long()
      found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=not greedy,
        guidance_scale=cases.GUIDANCE,
        negative_prompt_ids=prompt[:, -1:],
        **settings,
      )
      return {"ids": found.sequences[:, prompt.shape[1] :].numpy()}

    return run

  def _tokenize(self, case, batch):
    tokenizer = self._tokenizer
    images = cases.images(self._sizes, batch)

    def run():
      keep, codes = tokenizer(torch.from_numpy(images))
      codes = np.concatenate([row.numpy() for row in codes])
      return {"keep": keep.numpy(), "codes": codes}

    return run
