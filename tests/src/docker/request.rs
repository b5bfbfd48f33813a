//! The part of HTTP/1.1 that the scripted engine needs.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

/// A request.
pub(super) struct Request {
    pub(super) method: String,
    /// The path without the API version.
    pub(super) path: String,
    pub(super) query: String,
    pub(super) body: Vec<u8>,
}

/// Sends an answer.
pub(super) fn respond(mut stream: &UnixStream, status: u16, body: &str) -> std::io::Result<()> {
    let length = if status == 204 || status == 304 {
        String::new()
    } else {
        format!("content-length: {}\r\n", body.len())
    };
    let head = format!(
        "HTTP/1.1 {status} As-Told\r\napi-version: 1.53\r\ncontent-type: application/json\r\n{length}\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes())
}

/// Reads the next request; `None` at the end of the stream, or if the request is invalid.
pub(super) fn read_request(reader: &mut BufReader<&UnixStream>) -> Option<Request> {
    let mut line = String::new();
    if reader.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let (mut length, mut chunked) = (0, false);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
        chunked |= header == "transfer-encoding: chunked";
    }
    let body = if chunked { read_chunks(reader)? } else { read_bytes(reader, length)? };
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    // The API version prefix is ignored.
    let rest = path.strip_prefix("/v1.").and_then(|rest| rest.find('/').map(|at| &rest[at..]));
    Some(Request { method, path: rest.unwrap_or(path).to_owned(), query: query.to_owned(), body })
}

fn read_bytes(reader: &mut BufReader<&UnixStream>, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn read_chunks(reader: &mut BufReader<&UnixStream>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let length = usize::from_str_radix(line.trim(), 16).ok()?;
        body.extend(read_bytes(reader, length)?);
        reader.read_line(&mut line).ok()?;
        if length == 0 {
            return Some(body);
        }
    }
}

/// Returns a parameter of a query, percent-decoded.
pub(super) fn parameter(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
    let mut bytes = Vec::new();
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            b'+' => bytes.push(b' '),
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).ok()
}
