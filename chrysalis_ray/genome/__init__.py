"""Floor 2: the genome (what exists, sealed), its tokens, and the mix (how strongly each part is expressed).

`build` seals sources into a folder, `tokens` packs it into rows for one tokenizer, `mix` says which row stands at
which position. `mix` needs numpy only; `datasets` is imported in `sources` alone.
"""
