// One token from a row of logits. The same rules, in the same order, as the engine's sampler: temperature, min_p,
// top_k, then top_p of what top_k left; the token is where the cumulative distribution passes the uniform number.

#pragma once

#include <algorithm>
#include <vector>

#include "vec.h"

namespace pw {

struct Choice {
    float temperature, top_p, min_p;
    int32_t top_k;  // 0: off
    double uniform;
};

class Sampler {
   public:
    // logits [padded], padded a multiple of 16 and -inf beyond the vocabulary; overwritten. -1: the largest is infinite, as where every token is excluded.
    int draw(float* x, int padded, const Choice& choice) {
        if (!weigh(x, padded, choice)) return -1;
        if (choice.top_k > 0 && choice.top_k < padded) truncate(x, padded, choice.top_k, INFINITY);
        if (choice.top_p < 1) truncate(x, padded, INT32_MAX, choice.top_p * total(x, padded));
        return invert(x, padded, choice.uniform);
    }

   private:
    static constexpr int PIECE = 256, BUCKETS = 0x3f80 + 1;  // the high half of the bits of a float in [0, 1]

    // Logits -> weights relative to the most likely token, 1 at most.
    static bool weigh(float* x, int n, const Choice& choice) {
        F16 best = splat(-INFINITY);
        for (int i = 0; i < n; i += 16) best = max(best, load(x + i));
        float most = largest(best);
        if (!(most > -INFINITY) || most == INFINITY) return false;
        F16 inverse = splat(1.0f / choice.temperature);
        for (int i = 0; i < n; i += 16) {
            F16 w = exponential((load(x + i) - splat(most)) * inverse);
            store(x + i, choice.min_p > 0 ? keep(w, w, choice.min_p) : w);
        }
        return true;
    }

    static double total(const float* x, int n) {
        double sum = 0;
        for (int i = 0; i < n; i += PIECE) sum += piece(x + i, std::min(PIECE, n - i));
        return sum;
    }

    // Eight sums side by side: one would wait for itself at every addition. n a multiple of 8.
    static double piece(const float* x, int n) {
        double sums[8] = {};
        for (int i = 0; i < n; i += 8)
            for (int j = 0; j < 8; j++) sums[j] += x[i + j];
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }

    static uint32_t bucket(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits >> 16;
    }

    // Zeroes all but the `count` greatest, and of these all whose betters weigh `mass` or more; equals in order.
    void truncate(float* x, int n, int count, double mass) {
        counts_.assign(BUCKETS, 0);
        masses_.assign(BUCKETS, 0.0);
        for (int i = 0; i < n; i++)
            if (x[i] > 0) counts_[bucket(x[i])]++, masses_[bucket(x[i])] += x[i];
        int above = 0, edge = BUCKETS - 1;
        double before = 0;
        for (; edge > 0 && above + counts_[edge] <= count && before + masses_[edge] < mass; edge--) above += counts_[edge], before += masses_[edge];
        order_.clear();
        for (int i = 0; i < n; i++)
            if (x[i] > 0 && int(bucket(x[i])) == edge) order_.push_back(i);
        std::stable_sort(order_.begin(), order_.end(), [x](int a, int b) { return x[a] > x[b]; });
        size_t kept = 0;
        for (; kept < order_.size(); kept++) {
            if (above >= count || (above > 0 && before >= mass)) break;
            above++, before += x[order_[kept]];
        }
        for (size_t i = kept; i < order_.size(); i++) x[order_[i]] = 0;
        for (int i = 0; i < n; i++)
            if (int(bucket(x[i])) < edge) x[i] = 0;
    }

    static int invert(const float* x, int n, double uniform) {
        double target = uniform * total(x, n), sum = 0;
        int last = -1;
        for (int i = 0; i < n; i += PIECE) {
            int width = std::min(PIECE, n - i);
            double part = piece(x + i, width);
            if (sum + part <= target) {
                if (part > 0) last = i;
                sum += part;
                continue;
            }
            double inside = 0;
            for (int j = 0; j < width; j++) {
                inside += x[i + j];
                if (sum + inside > target) return i + j;
            }
            last = i;
            sum += part;
        }
        // The target rounded up to the total: then the last possible token is meant.
        int found = last;
        for (int j = last; j < std::min(last + PIECE, n); j++)
            if (x[j] > 0) found = j;
        return found;
    }

    std::vector<int> counts_, order_;
    std::vector<double> masses_;
};

}  // namespace pw
