"""Face landmarks and identity, with a detector and an embedder from ONNX files. Images are (H, W, 3) uint8 RGB."""

import math

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None

FFHQ = np.float32([[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]]) / 512
"""Where aligned faces have eyes, nose and corners of the mouth, as shares of the side."""
ARCFACE = np.float32(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where face embedders expect them, in pixels of 112x112."""


def need_opencv() -> None:
    if cv2 is None:
        raise ImportError('faces are found and embedded with OpenCV: pip install "lpmrf-fast[eval]"')


class Detector:
    """Five landmarks of the surest face, (5, 2) float32 in pixels: eyes, nose, corners of the mouth; None: no face.

    path: a YuNet ONNX file. It was trained on small faces, so the image is shrunk to `SIDES` pixels.
    """

    SIDES = (320, 160)

    def __init__(self, path):
        need_opencv()
        try:
            self.net = cv2.FaceDetectorYN.create(str(path), "", (self.SIDES[0],) * 2, 0.6)
        except (cv2.error, AttributeError) as error:
            raise ValueError(f"{path}: OpenCV {cv2.__version__} cannot use it ({_line(error)}); give YuNet") from None

    def __call__(self, image: np.ndarray) -> np.ndarray | None:
        best, score = None, 0.0
        for side in self.SIDES:
            scale = side / max(image.shape[:2])
            width, height = (max(1, round(n * scale)) for n in (image.shape[1], image.shape[0]))
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            self.net.setInputSize((width, height))
            found = self.net.detect(np.ascontiguousarray(small[..., ::-1]))[1]
            for face in found if found is not None else ():
                if face[-1] > score:
                    # YuNet's order is the viewer's: left eye, right eye, nose, left and right corner of the mouth.
                    best, score = face[4:14].reshape(5, 2) / [width, height] * image.shape[1::-1], face[-1]
        return None if best is None else best.astype(np.float32)


def landmark_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Euclidean distance of the landmarks in pixels."""
    return float(np.linalg.norm(a - b, axis=1).mean())


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) similarity transform that brings `source` (N, 2) nearest to `target` (Umeyama 1991)."""
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a / len(a))
    signs = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    turn = u * signs @ vt
    scale = (s * signs).sum() / a.var(0).sum()
    return np.hstack([scale * turn, (target.mean(0) - scale * turn @ source.mean(0))[:, None]])


class Embedder:
    """A face, cut by its landmarks → a unit vector.

    path: an ONNX face recogniser of the ArcFace kind, (1, 3, 112, 112) RGB in [-1, 1] → one vector; run by onnxruntime
    where installed, else by OpenCV.
    """

    def __init__(self, path):
        need_opencv()
        try:
            import onnxruntime
        except ImportError:
            onnxruntime = None
        try:
            if onnxruntime is not None:
                session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
                name = session.get_inputs()[0].name
                self.run = lambda x: session.run(None, {name: x})[0]
            else:
                net = cv2.dnn.readNetFromONNX(str(path))

                def run(x):
                    net.setInput(x)
                    return net.forward()

                self.run = run
            self(np.zeros((112, 112, 3), np.uint8), ARCFACE)
        except Exception as error:  # both libraries have error classes of their own
            raise ValueError(f"{path}: cannot embed a 112x112 face ({_line(error)}); give an ArcFace ONNX") from None

    def __call__(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        face = cv2.warpAffine(image, similarity(landmarks, ARCFACE), (112, 112), flags=cv2.INTER_LINEAR)
        x = (face.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
        vector = np.asarray(self.run(np.ascontiguousarray(x)), np.float64).ravel()
        return vector / max(np.linalg.norm(vector), 1e-12)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Between two unit vectors, in degrees."""
    return math.degrees(math.acos(float(np.clip(a @ b, -1, 1))))


def expected_landmarks(image: np.ndarray) -> np.ndarray:
    """Those of an aligned face of this size."""
    return FFHQ * np.float32(image.shape[1::-1])


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
