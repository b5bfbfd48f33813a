//! The one route, `POST /rpc`, with its checks in the order of the wire specification, A.2.
//!
//! One check, which the reference does not have, precedes them: whether the request is addressed to this host. If not, it is
//! refused with 403, before the caller can learn whether the route exists. The reference's clients always pass this check.

use std::convert::Infallible;
use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request as HttpRequest, Response as HttpResponse, StatusCode};
use tokio::time::timeout;

use super::auth::{Authorized, Presented, is_addressed_to_this_host};
use crate::daemon::rpc::protocol::{Envelope, Request, RequestError, Response};
use crate::daemon::rpc::request_handler::{Answer, FollowUp, RequestHandler};

/// The longest body, in bytes.
pub const BODY_BYTES_MAX: usize = 65_536;
/// The time limit for a client to send its body.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

const TOO_LONG: Refusal = Refusal(StatusCode::PAYLOAD_TOO_LARGE, "request exceeds buffer limit");
const INVALID_TOKEN: Refusal = Refusal(StatusCode::FORBIDDEN, "invalid restart token");
const OTHER_KIND: Refusal =
    Refusal(StatusCode::FORBIDDEN, "http transport only supports restart and secrets-patch");

/// A failed check of A.2.
#[derive(Debug, PartialEq, Eq)]
struct Refusal(StatusCode, &'static str);

/// Answers one request. `own` are the addresses of this endpoint. Returns the action that follows the answer, too.
pub(super) async fn respond<B>(
    request: HttpRequest<B>,
    own: &[IpAddr],
    request_handler: &RequestHandler,
) -> (HttpResponse<Full<Bytes>>, FollowUp)
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match handle(request, own, request_handler).await {
        Ok(Answer::Once(response, after)) => (http(StatusCode::OK, &response), after),
        // HTTP has no stream. The two permitted kinds never return one.
        Ok(Answer::Follow(..) | Answer::Native(_)) => {
            (http(StatusCode::OK, &Response::Done), FollowUp::none())
        }
        Err(Refusal(status, reason)) => (http(status, &Response::refused(reason)), FollowUp::none()),
    }
}

async fn handle<B>(
    request: HttpRequest<B>,
    own: &[IpAddr],
    request_handler: &RequestHandler,
) -> Result<Answer, Refusal>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    if !is_addressed_to_this_host(&head.headers, head.uri.authority(), own) {
        return Err(Refusal(StatusCode::FORBIDDEN, "host not allowed"));
    }
    if head.method != Method::POST || head.uri.path() != "/rpc" {
        return Err(Refusal(StatusCode::NOT_FOUND, "not found"));
    }
    let presented = Presented::in_headers(&head.headers)
        .ok_or(Refusal(StatusCode::UNAUTHORIZED, "missing bearer token"))?;
    if announced_length(&head.headers) > BODY_BYTES_MAX as u64 {
        return Err(TOO_LONG);
    }
    let body = read(body).await?;
    let envelope = Envelope::from_bytes(&body).map_err(|error| match error {
        RequestError::NotAnObject => Refusal(StatusCode::BAD_REQUEST, "invalid request"),
        _ => Refusal(StatusCode::BAD_REQUEST, "invalid request json"),
    })?;
    if !matches!(envelope.kind(), Some("restart" | "secrets-patch")) {
        return Err(OTHER_KIND);
    }
    request_handler.registry.replayed().await;
    let authorized =
        Authorized::check(&request_handler.registry.list(), envelope.container_name(), &presented)
            .ok_or(INVALID_TOKEN)?;
    execute(envelope, &authorized, request_handler).await
}

/// Executes the request of a container.
async fn execute(
    envelope: Envelope,
    authorized: &Authorized,
    request_handler: &RequestHandler,
) -> Result<Answer, Refusal> {
    Ok(match envelope.into_request() {
        Ok(Request::Restart(restart)) => {
            request_handler.restart(&restart, Some(authorized.registration())).await
        }
        Ok(Request::SecretsPatch(patch)) => request_handler.patch_secrets(&patch).await.into(),
        Ok(_) => return Err(OTHER_KIND),
        Err(error) => Response::refused(error).into(),
    })
}

/// Returns the `Content-Length` of the request; 0 if it is absent, for example with chunks. hyper refuses an invalid length.
fn announced_length(headers: &HeaderMap) -> u64 {
    let text = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    text.and_then(|length| length.trim().parse().ok()).unwrap_or(0)
}

async fn read<B>(body: B) -> Result<Bytes, Refusal>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match timeout(BODY_TIME_MAX, Limited::new(body, BODY_BYTES_MAX).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(TOO_LONG),
        Ok(Err(_)) => Err(Refusal(StatusCode::BAD_REQUEST, "request ended before its body did")),
        Err(_) => Err(Refusal(StatusCode::REQUEST_TIMEOUT, "request took too long")),
    }
}

fn http(status: StatusCode, response: &Response) -> HttpResponse<Full<Bytes>> {
    let mut http = HttpResponse::new(Full::new(Bytes::from(response.to_json())));
    *http.status_mut() = status;
    http.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    http
}

/// The result of hyper's service. A refusal is a response, too.
pub(super) type Served = Result<HttpResponse<Full<Bytes>>, Infallible>;
