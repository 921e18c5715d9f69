"""What drafts of whole blocks have in common: DFlash (2602.06036), and those that add to it. No algorithm itself.

A block stands at an *anchor* a: its slot 0 holds the token x_a, the others the mask token. One pass over the block,
which sees the target's features of everything before the anchor, drafts the tokens after it: step s of a block is
the token x_{a+1+s}, whose distribution the target gives at position a + s. It is predicted at slot s + 1, or at slot
s where the anchor's own slot predicts too (`sample_from_anchor`).
"""
