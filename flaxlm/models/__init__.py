"""What is computed: modules that are pytrees, called as pure functions.

The legend of shapes in the whole package, for suffixes (`x_BLD`) and einsum:
B batch · L query length · M key length · T = B*L tokens in one dimension · D embed ·
N query heads · K key/value heads · G = N/K · H head dim · F mlp · V vocab · E experts ·
S layers.
"""
