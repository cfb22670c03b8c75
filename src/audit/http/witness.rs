//! The witness's routes (C2SP tlog-witness).

use axum::extract::State as Room;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::audit::Audit;
use crate::audit::witness::{Answered, LARGEST};
use crate::kernel::web::Body;
use crate::kernel::{Refusal, problem};

/// Have a checkpoint of another log signed (C2SP tlog-witness): `old <size>`, a consistency proof, an empty line, the checkpoint
#[utoipa::path(post, path = "/witness/add-checkpoint", tag = "log", request_body(content = String, content_type = "text/plain"),
    responses((status = 200, content_type = "text/plain", body = String, description = "The line to put under the note"),
              (status = 400, description = "Not in form, or the old size is above that of the checkpoint"), (status = 403, description = "Signed by no key of this log"),
              (status = 404, description = "A log that is not watched here"), (status = 409, content_type = "text/x.tlog.size", body = String, description = "The size that was seen is another: this one"),
              (status = 422, description = "The proof does not hold")))]
pub(super) async fn add(Room(audit): Room<Audit>, Body(body): Body) -> Result<Response, Refusal> {
    if body.len() > LARGEST {
        return Err(Refusal::new(
            &problem::TOO_LARGE,
            format!("a checkpoint and its proof have at most {LARGEST} bytes"),
        ));
    }
    match audit.witness().add(&body).await? {
        Answered::Cosigned(line) => Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], line).into_response()),
        Answered::Size(size) => {
            let kind = [(header::CONTENT_TYPE, "text/x.tlog.size")];
            Ok((StatusCode::CONFLICT, kind, format!("{size}\n")).into_response())
        }
    }
}

/// The key that checks what this daemon signs as a witness
#[utoipa::path(get, path = "/witness/key", tag = "log", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn key(Room(audit): Room<Audit>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], format!("{}\n", audit.witness().verifier())).into_response()
}
