//! A request of the daemon's socket, as bytes that arrive in pieces:
//! - any split gives the result of one piece, and of a simple implementation of the wire specification (A.1.1, A.1.2);
//! - any line becomes a request or a refusal, and every answer is one line in the wire format.

#![no_main]

use landfall::daemon::rpc::codec::{LINE_BYTES_MAX, LineError, RequestLine};
use landfall::daemon::rpc::protocol::{Request, Response};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

type Outcome = Option<Result<Vec<u8>, LineError>>;

fuzz_target!(|input: (Vec<u8>, Vec<u16>, u8)| {
    let (text, cuts, padding) = input;
    // Long lines are rare among inputs, so one byte selects the length: up to slightly above the limit.
    let mut bytes = vec![b' '; usize::from(padding) * (LINE_BYTES_MAX + 64) / 255];
    bytes.extend_from_slice(&text);
    let whole = RequestLine::new().append(&bytes);
    assert_eq!(whole, naive(&bytes));
    assert_eq!(whole, in_pieces(&bytes, &cuts));
    if bytes.len() < 1_000 {
        assert_eq!(whole, byte_by_byte(&bytes));
    }
    match whole {
        None => {}
        Some(Err(error)) => check_refusal(&Response::refused(error)),
        Some(Ok(line)) => {
            assert!(line.len() < LINE_BYTES_MAX && !line.contains(&b'\n'));
            match Request::from_line(&line) {
                Ok(request) => assert!(is_object(&line), "{request:?}"),
                Err(error) => check_refusal(&Response::refused(error)),
            }
        }
    }
});

/// The first newline counts, if it is within the maximum length.
fn naive(bytes: &[u8]) -> Outcome {
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) if end < LINE_BYTES_MAX => Some(Ok(bytes[..end].to_vec())),
        _ if bytes.len() > LINE_BYTES_MAX => Some(Err(LineError::TooLong)),
        _ => None,
    }
}

fn in_pieces(bytes: &[u8], cuts: &[u16]) -> Outcome {
    let mut places: Vec<usize> = cuts.iter().map(|cut| usize::from(*cut) % (bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    let mut line = RequestLine::new();
    places.windows(2).find_map(|ends| line.append(&bytes[ends[0]..ends[1]]))
}

fn byte_by_byte(bytes: &[u8]) -> Outcome {
    let mut line = RequestLine::new();
    bytes.chunks(1).find_map(|byte| line.append(byte))
}

fn is_object(line: &[u8]) -> bool {
    matches!(serde_json::from_slice(line), Ok(Value::Object(_)))
}

fn check_refusal(response: &Response) {
    let text = response.to_json();
    assert!(!text.contains('\n'));
    let value: Value = serde_json::from_str(&text).expect("an answer is JSON");
    assert!(
        value["ok"] == false
            && value["reason"].is_string()
            && value.as_object().is_some_and(|fields| fields.len() == 2)
    );
}
