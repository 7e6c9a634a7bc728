"""Prime numbers of 64 bits: a deterministic test and the search for the next one."""

from __future__ import annotations

# Miller-Rabin with these bases has no false prime below 3.3e24 (Sorenson and Webster, 2015), so none in 64
# bits.
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(number: int) -> bool:
    """Whether `number` is prime; exact for every integer below 3.3e24."""
    if number < 2:
        return False
    for base in _BASES:
        if number % base == 0:
            return number == base
    shift = ((number - 1) & (1 - number)).bit_length() - 1
    odd = (number - 1) >> shift
    return all(_passes(number, base, odd, shift) for base in _BASES)


def _passes(number: int, base: int, odd: int, shift: int) -> bool:
    """Whether `number` = odd * 2^shift + 1 looks prime to `base`."""
    power = pow(base, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(shift - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def next_prime(least: int) -> int:
    """The smallest prime >= `least`."""
    candidate = max(least, 2)
    while not is_prime(candidate):
        candidate += 1
    return candidate
