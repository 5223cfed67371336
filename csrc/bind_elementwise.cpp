#include "bind_elementwise.hpp"

#include "elementwise.hpp"
#include "product.hpp"

namespace py = pybind11;

namespace fastgan {
namespace {

using Address = std::uintptr_t;  // of a tensor's first element, 0 for none: the caller keeps it alive

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// fn(T()) with T double or float.
template <typename Fn>
void with_type(bool is_double, const Fn& fn) {
  is_double ? fn(double()) : fn(float());
}

}  // namespace

void bind_elementwise(py::module_& m) {
  const auto def = [&](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  def("bias_act", [](bool is_double, Address src, Address dst, Address bias, std::int64_t rows, std::int64_t channels,
                     std::int64_t inner, double slope, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      bias_act(at<T>(src), at<T>(dst), at<T>(bias), rows, channels, inner, static_cast<T>(slope), threads);
    });
  });
  def("bias_tanh", [](bool is_double, Address src, Address dst, Address bias, std::int64_t rows, std::int64_t channels,
                      std::int64_t inner, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      bias_tanh(at<T>(src), at<T>(dst), at<T>(bias), rows, channels, inner, threads);
    });
  });
  def("mask_mul", [](bool is_double, Address src, Address dst, Address out, std::int64_t n, double slope, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      mask_mul(at<T>(src), at<T>(dst), at<T>(out), n, static_cast<T>(slope), threads);
    });
  });
  def("outer_mask", [](bool is_double, Address seed, Address weight, Address out, Address dst, std::int64_t rows,
                       std::int64_t cols, double slope, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      outer_mask(at<T>(seed), at<T>(weight), at<T>(out), at<T>(dst), rows, cols, static_cast<T>(slope), threads);
    });
  });
  def("mix", [](bool is_double, Address alpha, Address a, Address b, Address dst, std::int64_t rows, std::int64_t cols,
                int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      mix(at<T>(alpha), at<T>(a), at<T>(b), at<T>(dst), rows, cols, threads);
    });
  });
  def("scale_add",
      [](bool is_double, Address scale, Address a, Address r, std::int64_t rows, std::int64_t cols, int threads) {
        with_type(is_double, [&](auto zero) {
          using T = decltype(zero);
          scale_add(at<T>(scale), at<T>(a), at<T>(r), rows, cols, threads);
        });
      });
  def("channel_sum", [](bool is_double, Address src, Address weight, Address dst, std::int64_t rows,
                        std::int64_t channels, std::int64_t inner, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      channel_sum(at<T>(src), at<T>(weight), at<T>(dst), rows, channels, inner, threads);
    });
  });
  def("penalty", [](bool is_double, Address g, Address dst, Address value, Address rows_value, std::int64_t rows,
                    std::int64_t cols, bool norm, double weight, double target, double scale, bool add, int threads) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      penalty(at<T>(g), at<T>(dst), at<T>(value), at<T>(rows_value), rows, cols, norm, static_cast<T>(weight),
              static_cast<T>(target), static_cast<T>(scale), add, threads);
    });
  });
  def("discriminator_loss", [](bool is_double, int kind, Address real, Address fake, Address real_scale,
                               Address fake_scale, Address loss, Address real_mean, Address fake_mean, std::int64_t n) {
    with_type(is_double, [&](auto zero) {
      using T = decltype(zero);
      discriminator_loss(static_cast<Loss>(kind), at<T>(real), at<T>(fake), at<T>(real_scale), at<T>(fake_scale),
                         at<T>(loss), at<T>(real_mean), at<T>(fake_mean), n);
    });
  });
  def("generator_loss",
      [](bool is_double, int kind, Address fake, Address real, Address fake_scale, Address loss, std::int64_t n) {
        with_type(is_double, [&](auto zero) {
          using T = decltype(zero);
          generator_loss(static_cast<Loss>(kind), at<T>(fake), at<T>(real), at<T>(fake_scale), at<T>(loss), n);
        });
      });
  m.def("has_matrix_product", &has_matrix_product);
  def("matrix_product", [](Address a, std::int64_t lda, bool a_transposed, Address b, std::int64_t ldb,
                           bool b_transposed, Address c, std::int64_t m, std::int64_t n, std::int64_t k, int threads) {
    matrix_product(at<float>(a), lda, a_transposed, at<float>(b), ldb, b_transposed, at<float>(c), m, n, k, threads);
  });
}

}  // namespace fastgan
