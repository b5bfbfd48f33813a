//! Requests from a program in the container to the daemon on the host (wire specification, A.2): over the socket that
//! is mounted into the container, or else at the daemon's URL.
//!
//! If the environment names a socket, the URL is never used: while the daemon does not run, another user of the host
//! may listen there, and would receive the token.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::handshake;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::model::registration::Token;

/// The variable with the path of the socket in the container.
pub const SOCKET_VARIABLE: &str = "LANDFALL_HOSTD_SOCKET";
/// The variables with the URL and the token; the first one that is set counts (wire specification, A.12).
const URL_VARIABLES: [&str; 2] = ["LANDFALL_HOSTD_URL", "TYPECLAW_HOSTD_URL"];
const TOKEN_VARIABLES: [&str; 2] = ["LANDFALL_HOSTD_TOKEN", "TYPECLAW_HOSTD_TOKEN"];
/// The longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The time limit for an answer (wire specification, A.1.3: the budget of a restart).
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// The address of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Socket(PathBuf),
    /// A host and port.
    Url(String, u16),
}

/// The reason why a request failed.
#[derive(Debug, Error)]
pub enum HostdError {
    /// The environment names no daemon.
    #[error("neither {SOCKET_VARIABLE} nor LANDFALL_HOSTD_URL is set, so the daemon's address is unknown")]
    NoEndpoint,
    /// The environment has an invalid URL.
    #[error("the daemon's URL is not of the form http://HOST:PORT")]
    Url,
    /// The environment has no token.
    #[error("LANDFALL_HOSTD_TOKEN is not set")]
    NoToken,
    /// Connecting to the daemon failed.
    #[error("cannot connect to the daemon")]
    Unreachable(#[source] io::Error),
    /// The connection failed before the answer.
    #[error("the daemon did not answer")]
    Broken(#[source] hyper::Error),
    /// The answer has another format than the daemon's.
    #[error("the answer is not one of the daemon")]
    Nonsense,
    /// No answer arrived in time.
    #[error("the daemon did not answer within {} s", ANSWER_TIME_MAX.as_secs())]
    Late,
    /// The daemon refused.
    #[error("{reason}")]
    Refused {
        /// The status of the answer.
        status: u16,
        /// The daemon's reason.
        reason: String,
    },
}

/// The daemon that the environment names.
#[derive(Clone, Debug)]
pub struct Hostd {
    endpoint: Endpoint,
    token: Token,
}

impl Hostd {
    /// Reads the address and the token from the environment.
    ///
    /// # Errors
    /// [`HostdError::NoEndpoint`], [`HostdError::Url`] and [`HostdError::NoToken`].
    pub fn from_variables(read: impl Fn(&str) -> Option<String>) -> Result<Hostd, HostdError> {
        let set = |name: &str| read(name).filter(|value| !value.is_empty());
        let endpoint = match set(SOCKET_VARIABLE) {
            Some(path) => Endpoint::Socket(PathBuf::from(path)),
            None => {
                let url = URL_VARIABLES.iter().find_map(|name| set(name)).ok_or(HostdError::NoEndpoint)?;
                address_of(&url).ok_or(HostdError::Url)?
            }
        };
        let token = TOKEN_VARIABLES.iter().find_map(|name| Token::new(&set(name)?));
        Ok(Hostd { endpoint, token: token.ok_or(HostdError::NoToken)? })
    }

    /// Sends a request, and returns the result of a positive answer.
    ///
    /// # Errors
    /// [`HostdError`].
    pub async fn ask(&self, request: &Value) -> Result<Value, HostdError> {
        let asked = async {
            match &self.endpoint {
                Endpoint::Socket(path) => {
                    let stream = UnixStream::connect(path).await.map_err(HostdError::Unreachable)?;
                    self.converse(stream, "localhost", request).await
                }
                Endpoint::Url(host, port) => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await;
                    let stream = stream.map_err(HostdError::Unreachable)?;
                    self.converse(stream, &format!("{host}:{port}"), request).await
                }
            }
        };
        timeout(ANSWER_TIME_MAX, asked).await.map_err(|_| HostdError::Late)?
    }

    async fn converse(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        host: &str,
        request: &Value,
    ) -> Result<Value, HostdError> {
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(HostdError::Broken)?;
        // The task ends with the answer; an error is reported to the sender.
        let driven = tokio::spawn(connection);
        let request = Request::builder()
            .method(Method::POST)
            .uri("/rpc")
            .header(HOST, host)
            .header(AUTHORIZATION, format!("Bearer {}", self.token.reveal()))
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(request.to_string())))
            .map_err(|_| HostdError::Url)?;
        let answer = sender.send_request(request).await.map_err(HostdError::Broken)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|_| HostdError::Nonsense)?.to_bytes();
        driven.abort();
        read_answer(status, &body)
    }
}

fn read_answer(status: StatusCode, body: &[u8]) -> Result<Value, HostdError> {
    let mut answer: Value = serde_json::from_slice(body).map_err(|_| HostdError::Nonsense)?;
    match answer.get("ok").and_then(Value::as_bool) {
        Some(true) => Ok(answer["result"].take()),
        Some(false) => {
            let reason = answer["reason"].as_str().unwrap_or("no reason was given").to_owned();
            Err(HostdError::Refused { status: status.as_u16(), reason })
        }
        None => Err(HostdError::Nonsense),
    }
}

/// Returns host and port of a URL such as `http://host.docker.internal:8974`.
fn address_of(url: &str) -> Option<Endpoint> {
    let url: Uri = url.parse().ok()?;
    let is_http = url.scheme_str() == Some("http");
    let host = url.host()?.trim_matches(['[', ']']).to_owned();
    is_http.then(|| Endpoint::Url(host, url.port_u16().unwrap_or(80)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Endpoint, String> {
        let value = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Hostd::from_variables(value).map(|hostd| hostd.endpoint).map_err(|error| error.to_string())
    }

    #[test]
    fn a_socket_is_preferred_to_a_url() {
        let token = ("LANDFALL_HOSTD_TOKEN", "t");
        let url = ("LANDFALL_HOSTD_URL", "http://host.docker.internal:8974");
        let socket = (SOCKET_VARIABLE, "/run/landfall-http/http.sock");
        assert_eq!(read(&[url, socket, token]), Ok(Endpoint::Socket("/run/landfall-http/http.sock".into())));
        assert_eq!(read(&[url, token]), Ok(Endpoint::Url("host.docker.internal".to_owned(), 8974)));
        let theirs = [("TYPECLAW_HOSTD_URL", "http://[::1]:80"), ("TYPECLAW_HOSTD_TOKEN", "t")];
        assert_eq!(read(&theirs), Ok(Endpoint::Url("::1".to_owned(), 80)));
    }

    #[test]
    fn an_environment_that_names_no_daemon_is_reported() {
        assert!(read(&[]).unwrap_err().contains("the daemon's address is unknown"));
        assert!(
            read(&[(SOCKET_VARIABLE, ""), ("LANDFALL_HOSTD_TOKEN", "t")])
                .unwrap_err()
                .contains("the daemon's address")
        );
        assert!(read(&[(SOCKET_VARIABLE, "/s")]).unwrap_err().contains("LANDFALL_HOSTD_TOKEN is not set"));
        for url in ["https://x:1", "x", "", "ftp://x"] {
            let error = read(&[("LANDFALL_HOSTD_URL", url), ("LANDFALL_HOSTD_TOKEN", "t")]).unwrap_err();
            assert!(error.contains("http://HOST:PORT") || url.is_empty(), "{url}: {error}");
        }
    }

    #[test]
    fn invalid_answers_are_distinguished_from_refusals() {
        let read = |status, body: &str| read_answer(StatusCode::from_u16(status).unwrap(), body.as_bytes());
        assert_eq!(read(200, r#"{"ok":true,"result":{"scheduled":true}}"#).unwrap()["scheduled"], true);
        let refused = read(403, r#"{"ok":false,"reason":"invalid restart token"}"#).unwrap_err();
        assert!(matches!(refused, HostdError::Refused { status: 403, .. }));
        for nonsense in ["", "[]", "{}", "<html>"] {
            assert!(matches!(read(200, nonsense), Err(HostdError::Nonsense)), "{nonsense}");
        }
    }
}
