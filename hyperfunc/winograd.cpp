// 3x3 convolutions of stride 1, padded by 1, and the gradients of their kernels, by Winograd's F(2x2, 3x3): see
// winograd.py for the interface and the sources.
//
// Pictures are (n, height, width, channels) in float32, and their channels multiples of 16. A tile is 2x2 pixels of a
// convolution's output, for which it needs 4x4 pixels of its input. Both become 16 numbers per channel, between which
// the convolution is 16 products of matrices. Tiles are taken in blocks whose matrices stay in a core's second cache.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <omp.h>

namespace {

constexpr int64_t LANES = 8;
// Matrices lie this much apart, so that the same place of each is in another set of the first cache.
constexpr int64_t APART = 16;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline Vector gather(const float* from, int64_t step) {
  Vector found;
  for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = from[lane * step];
  return found;
}
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

struct Pictures {
  int64_t count, height, width;
  int64_t rows() const { return (height + 1) / 2; }
  int64_t columns() const { return (width + 1) / 2; }
  int64_t tiles() const { return count * rows() * columns(); }
};

// Calls use(tile's number in the block, picture, y, x, length) for each run of tiles that lie side by side.
template <class Use>
void for_runs(const Pictures& size, int64_t first, int64_t count, Use use) {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / size.columns(), column = (first + done) % size.columns();
    const int64_t length = std::min(count - done, size.columns() - column);
    use(done, row / size.rows(), row % size.rows() * 2, column * 2, length);
    done += length;
  }
}

// The 16 matrices of a block: begin, and apart numbers from one to the next.
struct Matrices {
  float* begin;
  int64_t apart;
  float* at(int64_t p) const { return begin + p * apart; }
};

// Shares the blocks of tiles out among the threads of the parallel region around, and calls
// use(first tile, number of tiles, in, out) for each, with room for its transformed input and output.
template <class Use>
void for_blocks(const Pictures& size, int64_t inputs, int64_t outputs, int64_t block, Use use) {
  const int64_t apart_in = block * inputs + APART, apart_out = block * outputs + APART;
  const std::unique_ptr<float[]> buffer(new float[16 * (apart_in + apart_out)]);
  const Matrices in = {buffer.get(), apart_in}, out = {in.at(16), apart_out};
#pragma omp for schedule(static)
  for (int64_t first = 0; first < size.tiles(); first += block)
    use(first, std::min(block, size.tiles() - first), in, out);
}

struct Rows {
  const float* begin;
  int64_t height, width, channels;
  // Zero where the pixel lies outside.
  Vector at(int64_t y, int64_t x, int64_t channel) const {
    if (y < 0 || y >= height || x < 0 || x >= width) return Vector{};
    return load(begin + (y * width + x) * channels + channel);
  }
};

// B^T d B of 4x4 pixels d, for a run of tiles; neighbours share two of their columns.
void transform_input(const Rows& picture, int64_t y, int64_t x, int64_t length, float* to, int64_t apart) {
  for (int64_t channel = 0; channel < picture.channels; channel += LANES) {
    Vector left[4][2];
    auto column = [&](int64_t x, Vector* first, int64_t step) {
      const Vector a = picture.at(y - 1, x, channel), b = picture.at(y, x, channel);
      const Vector c = picture.at(y + 1, x, channel), d = picture.at(y + 2, x, channel);
      first[0] = a - c, first[step] = b + c, first[2 * step] = c - b, first[3 * step] = b - d;
    };
    column(x - 1, &left[0][0], 2);
    column(x, &left[0][1], 2);
    float* tile = to + channel;
    for (int64_t index = 0; index < length; ++index, tile += picture.channels) {
      Vector right[4][2];
      column(x + 2 * index + 1, &right[0][0], 2);
      column(x + 2 * index + 2, &right[0][1], 2);
      for (int row = 0; row < 4; ++row) {
        float* at = tile + 4 * row * apart;
        store(at, left[row][0] - right[row][0]);
        store(at + apart, left[row][1] + right[row][0]);
        store(at + 2 * apart, right[row][0] - left[row][1]);
        store(at + 3 * apart, left[row][1] - right[row][1]);
        left[row][0] = right[row][0], left[row][1] = right[row][1];
      }
    }
  }
}

// A y A^T of 2x2 pixels y, for a run of tiles.
void transform_gradient(const Rows& picture, int64_t y, int64_t x, int64_t length, float* to, int64_t apart) {
  for (int64_t channel = 0; channel < picture.channels; channel += LANES) {
    float* tile = to + channel;
    for (int64_t index = 0; index < length; ++index, tile += picture.channels) {
      Vector rows[4][2];
      for (int column = 0; column < 2; ++column) {
        const Vector above = picture.at(y, x + 2 * index + column, channel);
        const Vector below = picture.at(y + 1, x + 2 * index + column, channel);
        rows[0][column] = above, rows[1][column] = above + below;
        rows[2][column] = above - below, rows[3][column] = -below;
      }
      for (int row = 0; row < 4; ++row) {
        float* at = tile + 4 * row * apart;
        store(at, rows[row][0]);
        store(at + apart, rows[row][0] + rows[row][1]);
        store(at + 2 * apart, rows[row][0] - rows[row][1]);
        store(at + 3 * apart, -rows[row][1]);
      }
    }
  }
}

// A^T m A, for a run of tiles, plus a bias: 2x2 pixels, of which those inside are written.
void transform_output(const float* from, int64_t apart, int64_t channels, const float* bias, float* picture,
                      int64_t height, int64_t width, int64_t y, int64_t x, int64_t length) {
  for (int64_t index = 0; index < length; ++index, x += 2, from += channels) {
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      Vector rows[2][4];
      for (int column = 0; column < 4; ++column) {
        const float* at = from + column * apart + channel;
        const Vector a = load(at), b = load(at + 4 * apart), c = load(at + 8 * apart), d = load(at + 12 * apart);
        rows[0][column] = a + b + c, rows[1][column] = b - c - d;
      }
      const Vector more = bias ? load(bias + channel) : Vector{};
      for (int row = 0; row < 2 && y + row < height; ++row) {
        float* pixel = picture + ((y + row) * width + x) * channels + channel;
        store(pixel, rows[row][0] + rows[row][1] + rows[row][2] + more);
        if (x + 1 < width) store(pixel + channels, rows[row][1] - rows[row][2] - rows[row][3] + more);
      }
    }
  }
}

// A matrix of which entry (i, j) is at begin[i * row + j * column].
struct Matrix {
  const float* begin;
  int64_t row, column;
};

// to[i][0..16) (+)= sum over k of left[i][k] right[k][0..16), for ROWS rows; `right` and `to` are 16 and more wide.
template <int ROWS, bool ADD>
void multiply_rows(Matrix left, const float* right, int64_t right_row, int64_t terms, float* to, int64_t to_row) {
  Vector sums[ROWS][2];
  for (int i = 0; i < ROWS; ++i)
    for (int half = 0; half < 2; ++half) sums[i][half] = ADD ? load(to + i * to_row + half * LANES) : Vector{};
  for (int64_t k = 0; k < terms; ++k, left.begin += left.column, right += right_row) {
    const Vector first = load(right), second = load(right + LANES);
    for (int i = 0; i < ROWS; ++i) {
      const float factor = left.begin[i * left.row];
      sums[i][0] += factor * first, sums[i][1] += factor * second;
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int half = 0; half < 2; ++half) store(to + i * to_row + half * LANES, sums[i][half]);
}

// The same for any number of rows and 16n columns: six rows at a time are what the registers hold, and parts are as
// equal as they can be.
template <bool ADD>
void multiply(Matrix left, int64_t rows, const float* right, int64_t right_row, int64_t columns, int64_t terms,
              float* to, int64_t to_row) {
  for (int64_t column = 0; column < columns; column += 2 * LANES)
    for (int64_t done = 0, parts = (rows + 5) / 6; parts > 0; --parts) {
      const int64_t count = (rows - done + parts - 1) / parts;
      const Matrix part = {left.begin + done * left.row, left.row, left.column};
      float* at = to + done * to_row + column;
      const auto run = count == 6   ? multiply_rows<6, ADD>
                       : count == 5 ? multiply_rows<5, ADD>
                       : count == 4 ? multiply_rows<4, ADD>
                       : count == 3 ? multiply_rows<3, ADD>
                       : count == 2 ? multiply_rows<2, ADD>
                                    : multiply_rows<1, ADD>;
      run(part, right + column, right_row, terms, at, to_row);
      done += count;
    }
}

// G g G^T of kernels g with 3x3 taps, as 16 matrices (rows, columns); `taps(tap, row, column)` are LANES numbers of a row.
template <class Taps>
void transform_kernel(int64_t rows, int64_t columns, Matrices to, Taps taps) {
#pragma omp for schedule(static)
  for (int64_t at = 0; at < rows * columns; at += LANES) {
    Vector half[4][3];
    for (int x = 0; x < 3; ++x) {
      const Vector a = taps(x, at / columns, at % columns), b = taps(3 + x, at / columns, at % columns);
      const Vector c = taps(6 + x, at / columns, at % columns);
      half[0][x] = a, half[1][x] = 0.5f * (a + c + b), half[2][x] = 0.5f * (a + c - b), half[3][x] = c;
    }
    for (int y = 0; y < 4; ++y) {
      const Vector ends = half[y][0] + half[y][2];
      store(to.at(4 * y) + at, half[y][0]);
      store(to.at(4 * y + 1) + at, 0.5f * (ends + half[y][1]));
      store(to.at(4 * y + 2) + at, 0.5f * (ends - half[y][1]));
      store(to.at(4 * y + 3) + at, half[y][2]);
    }
  }
}

// result (n, h, w, outputs) = the convolution of pictures (n, h, w, inputs), + bias; of the kernel, `taps` are rows of
// outputs.
template <class Taps>
void convolve_by(Taps taps, const float* pictures, const float* bias, float* result, const Pictures& size,
                 int64_t inputs, int64_t outputs, int64_t block, int64_t threads) {
  const int64_t apart = inputs * outputs + APART;
  const std::unique_ptr<float[]> buffer(new float[16 * apart]);
  const Matrices weights = {buffer.get(), apart};
#pragma omp parallel num_threads(threads)
  {
    transform_kernel(inputs, outputs, weights, taps);
    for_blocks(size, inputs, outputs, block, [&](int64_t first, int64_t tiles, Matrices in, Matrices out) {
      for_runs(size, first, tiles, [&](int64_t tile, int64_t picture, int64_t y, int64_t x, int64_t length) {
        const Rows rows = {pictures + picture * size.height * size.width * inputs, size.height, size.width, inputs};
        transform_input(rows, y, x, length, in.begin + tile * inputs, in.apart);
      });
      for (int64_t p = 0; p < 16; ++p)
        multiply<false>({in.at(p), inputs, 1}, tiles, weights.at(p), outputs, outputs, inputs, out.at(p), outputs);
      for_runs(size, first, tiles, [&](int64_t tile, int64_t picture, int64_t y, int64_t x, int64_t length) {
        transform_output(out.begin + tile * outputs, out.apart, outputs, bias,
                         result + picture * size.height * size.width * outputs, size.height, size.width, y, x, length);
      });
    });
  }
}

}  // namespace

// result (n, h, w, outputs) = the convolution of pictures (n, h, w, inputs) by kernel (outputs, 3, 3, inputs), + bias.
extern "C" void convolve(const float* pictures, const float* kernel, const float* bias, float* result, int64_t count,
                         int64_t height, int64_t width, int64_t inputs, int64_t outputs, int64_t block,
                         int64_t threads) {
  const auto taps = [=](int64_t tap, int64_t input, int64_t output) {
    return gather(kernel + (output * 9 + tap) * inputs + input, 9 * inputs);
  };
  convolve_by(taps, pictures, bias, result, {count, height, width}, inputs, outputs, block, threads);
}

// result (n, h, w, inputs) = the gradient of the pictures, from the gradient (n, h, w, outputs) of what the kernel
// (outputs, 3, 3, inputs) made of them: each output goes back through the same taps from the other end.
extern "C" void input_gradient(const float* gradient, const float* kernel, float* result, int64_t count, int64_t height,
                               int64_t width, int64_t inputs, int64_t outputs, int64_t block, int64_t threads) {
  const auto taps = [=](int64_t tap, int64_t output, int64_t input) {
    return load(kernel + (output * 9 + 8 - tap) * inputs + input);
  };
  convolve_by(taps, gradient, nullptr, result, {count, height, width}, outputs, inputs, block, threads);
}

// result (outputs, 3, 3, inputs) = the gradient of the kernel, from pictures (n, h, w, inputs) and the gradient
// (n, h, w, outputs) of what was made of them.
extern "C" void kernel_gradient(const float* pictures, const float* gradient, float* result, int64_t count,
                                int64_t height, int64_t width, int64_t inputs, int64_t outputs, int64_t block,
                                int64_t threads) {
  const Pictures size = {count, height, width};
  const int64_t area = inputs * outputs;
  const std::unique_ptr<float[]> all(new float[threads * 16 * area]);
#pragma omp parallel num_threads(threads)
  {
    float* sums = all.get() + omp_get_thread_num() * 16 * area;
    std::fill(sums, sums + 16 * area, 0.f);
    for_blocks(size, inputs, outputs, block, [&](int64_t first, int64_t tiles, Matrices in, Matrices out) {
      for_runs(size, first, tiles, [&](int64_t tile, int64_t picture, int64_t y, int64_t x, int64_t length) {
        const Rows rows = {pictures + picture * height * width * inputs, height, width, inputs};
        transform_input(rows, y, x, length, in.begin + tile * inputs, in.apart);
        const Rows gradients = {gradient + picture * height * width * outputs, height, width, outputs};
        transform_gradient(gradients, y, x, length, out.begin + tile * outputs, out.apart);
      });
      for (int64_t p = 0; p < 16; ++p)
        multiply<true>({out.at(p), 1, outputs}, outputs, in.at(p), inputs, inputs, tiles, sums + p * area, inputs);
    });
    // G^T s G of the sums over all threads
#pragma omp for schedule(static)
    for (int64_t at = 0; at < area; at += LANES) {
      Vector rows[3][4];
      for (int column = 0; column < 4; ++column) {
        Vector s[4] = {};
        for (int row = 0; row < 4; ++row)
          for (int64_t thread = 0; thread < omp_get_num_threads(); ++thread)
            s[row] += load(all.get() + (thread * 16 + 4 * row + column) * area + at);
        rows[0][column] = s[0] + 0.5f * (s[1] + s[2]), rows[1][column] = 0.5f * (s[1] - s[2]);
        rows[2][column] = 0.5f * (s[1] + s[2]) + s[3];
      }
      for (int row = 0; row < 3; ++row) {
        float* to = result + (at / inputs * 9 + 3 * row) * inputs + at % inputs;
        const Vector middle = 0.5f * (rows[row][1] + rows[row][2]);
        store(to, rows[row][0] + middle);
        store(to + inputs, 0.5f * (rows[row][1] - rows[row][2]));
        store(to + 2 * inputs, middle + rows[row][3]);
      }
    }
  }
}
