"""Hooks of mkdocs: what a page on the site has otherwise than on GitHub.

Links that leave docs/ lead to the source code. On the site they go to the
repository where mkdocs.yml names one (repo_url), else they become plain text.
"""

import re

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown, *, page, config, files):
  """Returns a page's Markdown with its links to the source code replaced."""
  del page, files
  repository = (config.get("repo_url") or "").rstrip("/")

  def replace(match):
    text, target = match.groups()
    if repository:
      return f"[{text}]({repository}/blob/main/{target})"
    path = target.replace("#L", " line ")
    return text if text.strip("`") == path else f"{text} (`{path}`)"

  return _OUTSIDE.sub(replace, markdown)
