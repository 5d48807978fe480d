// Every kernel of a frame, for one cubin a GPU: kernels.<sm>.cubin in the bundle.
#include "ldknn.cu"
#include "ldknn_int8.cu"
#include "ldknn_sm90.cu"
#include "postprocess.cu"
#include "preprocess.cu"
