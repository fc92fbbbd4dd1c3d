"""What is computed: modules that are pytrees, called as pure functions.

Shape legend of the whole package, used as suffixes (`x_BLD`) and in einsum:
B batch · L query length · M key length · T = B*L tokens in one axis · D embed ·
N query heads · K key/value heads · G = N/K · H head dim · F mlp · V vocab · S layers.
"""
