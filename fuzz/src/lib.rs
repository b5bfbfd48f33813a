//! Shared parts of the fuzz targets.

#[doc(hidden)]
pub use {bytes, landfall, libfuzzer_sys, serde_json};

/// Defines a target for the messages of one direction of the port broker, as text and as a binary frame:
/// - every parsed message survives a round trip;
/// - a payload is parsed exactly where a simple reading of the JSON finds canonical base64.
#[macro_export]
macro_rules! broker_message {
    ($Message:ident) => {
        use $crate::bytes::Bytes;
        use $crate::landfall::broker::message::{Frame, from_binary, to_binary, $Message};
        use $crate::serde_json::Value;

        $crate::libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            if let Ok(text) = std::str::from_utf8(data) {
                check_text(text);
            }
            if let Ok(Some((stream, frame))) = from_binary(Bytes::copy_from_slice(data)) {
                let Frame::Data(payload) = &frame else { panic!("{frame:?} is no payload") };
                assert_eq!(to_binary(stream, payload).as_deref(), Some(data));
            }
        });

        fn check_text(text: &str) {
            let read = $Message::from_text(text);
            if let Ok(Some(message)) = &read {
                let written = message.to_text();
                assert_eq!($Message::from_text(&written).as_ref(), Ok(&Some(message.clone())), "{written}");
            }
            let Ok(naive) = $crate::serde_json::from_str::<Value>(text) else { return };
            if naive["type"] != "relay-data" {
                return;
            }
            match &read {
                Ok(Some(message @ $Message::Relay(stream, Frame::Data(_)))) => {
                    let written: Value =
                        $crate::serde_json::from_str(&message.to_text()).expect("what we write is JSON");
                    assert_eq!(written["bytes"], naive["bytes"]);
                    assert_eq!(naive["streamId"].as_f64(), written["streamId"].as_f64(), "{stream:?}");
                }
                Ok(other) => panic!("{other:?}"),
                Err(_) => {
                    let is_id = naive["streamId"].as_i64().is_some();
                    assert!(!is_id || !naive["bytes"].as_str().is_some_and($crate::is_canonical));
                }
            }
        }
    };
}

/// Returns whether this is base64 with padding and without excess bits (RFC 4648, 4 and 3.5).
pub fn is_canonical(text: &str) -> bool {
    let digits = text.trim_end_matches('=');
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let spare = match (digits.len() % 4, text.len() - digits.len()) {
        (0, 0) => 0,
        (2, 2) => 0b1111,
        (3, 1) => 0b11,
        _ => return false,
    };
    let last = digits.bytes().last().and_then(value).unwrap_or(0);
    digits.bytes().all(|byte| value(byte).is_some()) && last & spare == 0
}
