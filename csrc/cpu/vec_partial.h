// SPDX-License-Identifier: MIT
// Loads and stores of fewer than V elements through a buffer, for instruction sets without masks.

template <typename T>
VEC_INLINE Vec load_n(const T* p, int count) {
  T buffer[V] = {};
  for (int i = 0; i < count; i++) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
VEC_INLINE void store_n(T* p, Vec x, int count) {
  T buffer[V];
  store(buffer, x);
  for (int i = 0; i < count; i++) p[i] = buffer[i];
}
