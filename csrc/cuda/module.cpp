// `import patchpack._C_cuda` gives the operators `patchpack::<op>.cuda` their kernels, which every
// <op>.cu registers at its end. Their schemas are in patchpack/ops/<op>.py.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
