// Constants of the normals, the same in kernels/keyed.py; the polynomials are printed by `python -m bench.fit_normal`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ttcfast {

// -2 ln(1 + f) / f on [-1/2, 0], by rising powers of f; relative error 2.7e-8.
constexpr float kLog[9] = {-2.0f,         0.999990463f, -0.667264223f, 0.487365156f, -0.527382374f,
                           -0.361906648f, -2.41743279f, -3.2791853f,   -2.82909846f};
constexpr float kMinusTwoLn2 = -1.38629436f;
// x + x^3 (.. x^2 ..) and 1 + x^2 (.. x^2 ..) up to an eighth of a turn; relative errors 8.3e-9 and 4.6e-8.
constexpr float kSin[3] = {-0.166666552f, 0.0083321603f, -0.000195152825f};
constexpr float kCos[3] = {-0.499998838f, 0.0416557789f, -0.00135918532f};
constexpr float kTurn = 3.657295198e-10f;  // 2 pi / 2^34

}  // namespace ttcfast
