// The element types of the loops for CPUs: float, and bfloat16 by its bits.

#pragma once

#include <cstdint>
#include <cstring>

// The same bits as another type; std::bit_cast is younger than the compilers that are in use.
template <typename To, typename From> inline To bits_of(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "the types must have one size");
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

using Bf16 = uint16_t;  // the upper half of a float's bits

inline float load(float x) { return x; }

inline float load(Bf16 x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }

// The bits of the nearest bfloat16, ties to even, in the upper half. A NaN stays one, unless all
// of its upper bits are set, which no instruction produces.
inline uint32_t nearest(float x) {
    uint32_t bits = bits_of<uint32_t>(x);
    return bits + 0x7FFF + ((bits >> 16) & 1);
}

template <typename T> T rounded(float x);
template <> inline float rounded<float>(float x) { return x; }
template <> inline Bf16 rounded<Bf16>(float x) { return static_cast<Bf16>(nearest(x) >> 16); }
