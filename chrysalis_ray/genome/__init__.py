"""Floor 2: the genome (what exists, sealed), its tokens, and the mix (how strongly each part is expressed).

`build` seals sources into a folder (`git_source`, `archives`, `packages` and `sources` read them, `marks` and `similarity` say
what is noticed, `proofs` and `framing` give it away), `tokens` packs it into rows for one tokenizer, `mix` says which row
stands at which position, `exposure` the reverse, and `epigenome` changes mixes. `mix` needs numpy only; `datasets` is imported
in `sources` alone. How shares come of an epigenome stands in `core.shares`, because a report tells them too.
"""
