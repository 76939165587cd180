/* Runs a SavedModel by TensorFlow's C API alone, as a server does.

   The first argument is its folder, any others are libraries of more operations. Requests come in on stdin, answers go out on stdout, all numbers
   int64 in the machine's byte order, and bytes behind their number.

   request: number of inputs, each a name and a tensor; number of outputs, each a name
   answer: code, 0 if all is well; then a tensor for each output, or the bytes of the error
   name: bytes of the operation, index of its output
   tensor: dtype, rank, dimensions; then the bytes of all numbers, or of one string after the other */

#include <stdio.h>
#include <stdlib.h>

#include "tensorflow/c/c_api.h"

static void fail(const char *message) {
  fprintf(stderr, "%s\n", message);
  exit(1);
}

static void *allocate(size_t size) {
  void *memory = malloc(size + 1);
  if (memory == NULL) fail("out of memory");
  return memory;
}

static void read_into(void *to, size_t size) {
  if (fread(to, 1, size, stdin) != size) fail("the request is cut off");
}

static int64_t read_number(void) {
  int64_t number;
  read_into(&number, sizeof number);
  return number;
}

static char *read_bytes(size_t *size) {
  *size = read_number();
  char *bytes = allocate(*size);
  read_into(bytes, *size);
  bytes[*size] = '\0';
  return bytes;
}

static TF_Output read_name(TF_Graph *graph) {
  size_t size;
  char *name = read_bytes(&size);
  TF_Output output = {TF_GraphOperationByName(graph, name), read_number()};
  if (output.oper == NULL) fail(name);
  free(name);
  return output;
}

static int64_t elements(const int64_t *dims, int rank) {
  int64_t number = 1;
  for (int i = 0; i < rank; i++) number *= dims[i];
  return number;
}

static TF_Tensor *read_tensor(void) {
  TF_DataType dtype = read_number();
  int rank = read_number();
  int64_t *dims = allocate(rank * sizeof *dims);
  for (int i = 0; i < rank; i++) dims[i] = read_number();
  int64_t number = elements(dims, rank);
  size_t width = dtype == TF_STRING ? sizeof(TF_TString) : TF_DataTypeSize(dtype);
  TF_Tensor *tensor = TF_AllocateTensor(dtype, dims, rank, number * width);
  if (dtype == TF_STRING) {
    TF_TString *strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < number; i++) {
      size_t size;
      char *bytes = read_bytes(&size);
      TF_StringInit(&strings[i]);
      TF_StringCopy(&strings[i], bytes, size);
      free(bytes);
    }
  } else {
    size_t size = read_number();
    if (size != TF_TensorByteSize(tensor)) fail("the tensor has another size");
    read_into(TF_TensorData(tensor), size);
  }
  free(dims);
  return tensor;
}

static void write_number(int64_t number) { fwrite(&number, sizeof number, 1, stdout); }

static void write_bytes(const void *bytes, size_t size) {
  write_number(size);
  fwrite(bytes, 1, size, stdout);
}

static void write_tensor(const TF_Tensor *tensor) {
  write_number(TF_TensorType(tensor));
  write_number(TF_NumDims(tensor));
  for (int i = 0; i < TF_NumDims(tensor); i++) write_number(TF_Dim(tensor, i));
  if (TF_TensorType(tensor) == TF_STRING) {
    const TF_TString *strings = TF_TensorData(tensor);
    for (int64_t i = 0; i < TF_TensorElementCount(tensor); i++)
      write_bytes(TF_StringGetDataPointer(&strings[i]), TF_StringGetSize(&strings[i]));
  } else {
    write_bytes(TF_TensorData(tensor), TF_TensorByteSize(tensor));
  }
}

static void answer(TF_Session *session, TF_Graph *graph, TF_Status *status) {
  int num_inputs = read_number();
  TF_Output *inputs = allocate(num_inputs * sizeof *inputs);
  TF_Tensor **values = allocate(num_inputs * sizeof *values);
  for (int i = 0; i < num_inputs; i++) {
    inputs[i] = read_name(graph);
    values[i] = read_tensor();
  }
  int num_outputs = read_number();
  TF_Output *outputs = allocate(num_outputs * sizeof *outputs);
  TF_Tensor **results = allocate(num_outputs * sizeof *results);
  for (int i = 0; i < num_outputs; i++) outputs[i] = read_name(graph);

  TF_SessionRun(session, NULL, inputs, values, num_inputs, outputs, results, num_outputs, NULL, 0,
                NULL, status);
  write_number(TF_GetCode(status));
  if (TF_GetCode(status) == TF_OK) {
    for (int i = 0; i < num_outputs; i++) {
      write_tensor(results[i]);
      TF_DeleteTensor(results[i]);
    }
  } else {
    const char *message = TF_Message(status);
    size_t size = 0;
    while (message[size] != '\0') size++;
    write_bytes(message, size);
  }
  fflush(stdout);
  for (int i = 0; i < num_inputs; i++) TF_DeleteTensor(values[i]);
  free(inputs);
  free(values);
  free(outputs);
  free(results);
}

int main(int argc, char **argv) {
  if (argc < 2) fail("usage: saved_model_server FOLDER [LIBRARY ...]");
  TF_Status *status = TF_NewStatus();
  for (int i = 2; i < argc; i++) {
    TF_LoadLibrary(argv[i], status);
    if (TF_GetCode(status) != TF_OK) fail(TF_Message(status));
  }
  TF_Graph *graph = TF_NewGraph();
  TF_SessionOptions *options = TF_NewSessionOptions();
  const char *tags[] = {"serve"};
  TF_Session *session =
      TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  if (TF_GetCode(status) != TF_OK) fail(TF_Message(status));
  int next;
  while ((next = getchar()) != EOF) {
    ungetc(next, stdin);
    answer(session, graph, status);
  }
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
