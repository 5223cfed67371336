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

template <typename T>
void bind(py::module_& m, const char* suffix) {
  const auto def = [&](const char* name, auto function) {
    m.def((std::string(name) + suffix).c_str(), function, py::call_guard<py::gil_scoped_release>());
  };
  def("bias_act", [](Address src, Address dst, Address bias, std::int64_t rows, std::int64_t channels,
                     std::int64_t inner, double slope, int threads) {
    bias_act(at<T>(src), at<T>(dst), at<T>(bias), rows, channels, inner, static_cast<T>(slope), threads);
  });
  def("bias_tanh", [](Address src, Address dst, Address bias, std::int64_t rows, std::int64_t channels,
                      std::int64_t inner, int threads) {
    bias_tanh(at<T>(src), at<T>(dst), at<T>(bias), rows, channels, inner, threads);
  });
  def("mask_mul", [](Address src, Address dst, Address out, std::int64_t n, double slope, int threads) {
    mask_mul(at<T>(src), at<T>(dst), at<T>(out), n, static_cast<T>(slope), threads);
  });
  def("outer_mask", [](Address seed, Address weight, Address out, Address dst, std::int64_t rows, std::int64_t cols,
                       double slope, int threads) {
    outer_mask(at<T>(seed), at<T>(weight), at<T>(out), at<T>(dst), rows, cols, static_cast<T>(slope), threads);
  });
  def("mix", [](Address alpha, Address a, Address b, Address dst, std::int64_t rows, std::int64_t cols, int threads) {
    mix(at<T>(alpha), at<T>(a), at<T>(b), at<T>(dst), rows, cols, threads);
  });
  def("scale_add", [](Address scale, Address a, Address r, std::int64_t rows, std::int64_t cols, int threads) {
    scale_add(at<T>(scale), at<T>(a), at<T>(r), rows, cols, threads);
  });
  def("channel_sum", [](Address src, Address weight, Address dst, std::int64_t rows, std::int64_t channels,
                        std::int64_t inner, int threads) {
    channel_sum(at<T>(src), at<T>(weight), at<T>(dst), rows, channels, inner, threads);
  });
  def("penalty", [](Address g, Address dst, Address value, Address rows_value, std::int64_t rows, std::int64_t cols,
                    bool norm, double weight, double target, double scale, bool add, int threads) {
    penalty(at<T>(g), at<T>(dst), at<T>(value), at<T>(rows_value), rows, cols, norm, static_cast<T>(weight),
            static_cast<T>(target), static_cast<T>(scale), add, threads);
  });
  def("discriminator_loss", [](int kind, Address real, Address fake, Address real_scale, Address fake_scale,
                               Address loss, Address real_mean, Address fake_mean, std::int64_t n) {
    discriminator_loss(static_cast<Loss>(kind), at<T>(real), at<T>(fake), at<T>(real_scale), at<T>(fake_scale),
                       at<T>(loss), at<T>(real_mean), at<T>(fake_mean), n);
  });
  def("generator_loss", [](int kind, Address fake, Address real, Address fake_scale, Address loss, std::int64_t n) {
    generator_loss(static_cast<Loss>(kind), at<T>(fake), at<T>(real), at<T>(fake_scale), at<T>(loss), n);
  });
}

}  // namespace

void bind_elementwise(py::module_& m) {
  bind<float>(m, "_f32");
  bind<double>(m, "_f64");
  m.def("has_matrix_product", &has_matrix_product);
  m.def(
      "matrix_product",
      [](Address a, std::int64_t lda, bool a_transposed, Address b, std::int64_t ldb, bool b_transposed, Address c,
         std::int64_t m, std::int64_t n, std::int64_t k, int threads) {
        matrix_product(at<float>(a), lda, a_transposed, at<float>(b), ldb, b_transposed, at<float>(c), m, n, k, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastgan
