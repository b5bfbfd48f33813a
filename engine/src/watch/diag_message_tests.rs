use proptest::prelude::*;

use super::*;

fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + payload.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn socket_message(row: Listening, state: u8) -> Vec<u8> {
    let mut payload = vec![0; SOCKET_BYTES];
    payload[1] = state;
    payload[4..6].copy_from_slice(&row.port.get().to_be_bytes());
    match row.address {
        IpAddr::V4(v4) => payload[8..12].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => payload[8..24].copy_from_slice(&v6.octets()),
    }
    payload[0] = if row.address.is_ipv4() { 2 } else { 10 };
    payload[64..68].copy_from_slice(&row.uid.to_ne_bytes());
    payload[68..72].copy_from_slice(&u32::try_from(row.inode).unwrap().to_ne_bytes());
    // An attribute after the fixed part, as the kernel appends it.
    payload.extend([5, 0, 8, 0, 0, 0, 0, 0]);
    message(SOCK_DIAG_BY_FAMILY, 2, 7, &payload)
}

fn row(port: u16, address: &str) -> Listening {
    Listening {
        port: NonZeroU16::new(port).unwrap(),
        address: address.parse().unwrap(),
        inode: 24713,
        uid: 1000,
    }
}

fn decode(bytes: &[u8], family: Family) -> (Result<Progress, ReadError>, Vec<Listening>) {
    let mut rows = Vec::new();
    (datagram(bytes, 7, family, |row| rows.push(row)), rows)
}

#[test]
fn a_request_has_the_layout_of_the_kernel() {
    let bytes = request(Family::V6, 0x0102_0304);
    assert_eq!(u32::from_ne_bytes(bytes[0..4].try_into().unwrap()), 72);
    assert_eq!(u16::from_ne_bytes(bytes[4..6].try_into().unwrap()), 20);
    assert_eq!(u16::from_ne_bytes(bytes[6..8].try_into().unwrap()), 0x301);
    assert_eq!(u32::from_ne_bytes(bytes[8..12].try_into().unwrap()), 0x0102_0304);
    assert_eq!((bytes[16], bytes[17], u32::from_ne_bytes(bytes[20..24].try_into().unwrap())), (10, 6, 1024));
}

#[test]
fn listeners_of_both_families_are_read_in_order() {
    let v4 = [row(80, "127.0.0.1"), row(8080, "0.0.0.0"), row(53, "127.0.0.53")];
    let bytes: Vec<u8> = v4.iter().flat_map(|&row| socket_message(row, TCP_LISTEN)).collect();
    assert_eq!(decode(&bytes, Family::V4).1, v4);
    let v6 = row(3000, "::1");
    let bytes = [socket_message(v6, TCP_LISTEN), message(NLMSG_DONE, 2, 7, &[0; 4])].concat();
    let (progress, rows) = decode(&bytes, Family::V6);
    assert_eq!(progress.unwrap(), Progress { done: true, interrupted: false });
    assert_eq!(rows, [v6]);
}

#[test]
fn other_families_states_and_sequences_are_passed_over() {
    let mut other_sequence = socket_message(row(80, "127.0.0.1"), TCP_LISTEN);
    other_sequence[8] ^= 0xff;
    let bytes =
        [socket_message(row(80, "::1"), TCP_LISTEN), socket_message(row(80, "127.0.0.1"), 1), other_sequence]
            .concat();
    let (progress, rows) = decode(&bytes, Family::V4);
    assert_eq!((progress.unwrap(), rows), (Progress { done: false, interrupted: false }, vec![]));
}

#[test]
fn an_interrupted_dump_is_reported() {
    let bytes = message(NLMSG_DONE, NLM_F_DUMP_INTR, 7, &[0; 4]);
    assert!(decode(&bytes, Family::V4).0.unwrap().interrupted);
}

#[test]
fn refusals_carry_the_reason_of_the_kernel() {
    for kind in [NLMSG_ERROR, NLMSG_DONE] {
        let result = decode(&message(kind, 0, 7, &(-2i32).to_ne_bytes()), Family::V4).0;
        assert!(matches!(result, Err(ReadError::Refused(Errno::NOENT))), "{result:?}");
        let hostile = decode(&message(kind, 0, 7, &i32::MIN.to_ne_bytes()), Family::V4).0;
        assert!(matches!(hostile, Err(ReadError::Refused(_))));
    }
    assert!(decode(&message(NLMSG_ERROR, 0, 7, &[0; 4]), Family::V4).0.is_ok());
}

#[test]
fn every_truncated_answer_is_an_error() {
    let bytes = socket_message(row(80, "127.0.0.1"), TCP_LISTEN);
    for cut in 1..bytes.len() {
        assert!(matches!(decode(&bytes[..cut], Family::V4).0, Err(ReadError::Malformed(_))), "{cut}");
    }
    for length in [0u32, 1, 15, 16 + 71, u32::MAX] {
        let mut hostile = bytes.clone();
        hostile[..4].copy_from_slice(&length.to_ne_bytes());
        assert!(decode(&hostile, Family::V4).0.is_err(), "{length}");
    }
}

#[test]
fn a_lookup_has_the_layout_of_the_kernel() {
    let (local, peer) = ("127.0.0.1:8973".parse().unwrap(), "127.0.0.2:40000".parse().unwrap());
    let bytes = lookup_request(local, peer, 1, 7);
    assert_eq!(u16::from_ne_bytes(bytes[6..8].try_into().unwrap()), NLM_F_REQUEST, "no dump");
    assert_eq!((bytes[16], bytes[17], &bytes[20..24]), (2, 6, &[0xff; 4][..]));
    assert_eq!((&bytes[24..28], &bytes[28..32]), (&[0x23, 0x0d, 0x9c, 0x40][..], &[127, 0, 0, 1][..]));
    assert_eq!((&bytes[32..44], &bytes[44..48]), (&[0; 12][..], &[127, 0, 0, 2][..]));
    assert_eq!((&bytes[60..64], &bytes[64..72]), (&1u32.to_ne_bytes()[..], &[0xff; 8][..]));
    let v6 = lookup_request("[::1]:1".parse().unwrap(), "[::2]:2".parse().unwrap(), 0, 7);
    assert_eq!((v6[16], v6[43], v6[59]), (10, 1, 2));
}

#[test]
fn a_lookup_returns_a_socket_or_none() {
    let found = |state| {
        let bytes = socket_message(row(80, "127.0.0.1"), state);
        lookup_answer(&bytes, 7).unwrap().unwrap()
    };
    assert_eq!((found(TCP_LISTEN).is_listener, found(1).is_listener), (true, false));
    assert_eq!((found(1).uid, found(1).inode, found(1).cookie), (1000, 24713, 0));
    let error = |number: i32| message(NLMSG_ERROR, 0, 7, &number.to_ne_bytes());
    assert_eq!(lookup_answer(&error(-2), 7), Ok(None));
    assert_eq!(lookup_answer(&error(-1), 7), Err(ReadError::Refused(Errno::PERM)));
    for wrong in [error(0), message(NLMSG_DONE, 0, 7, &[0; 4]), message(SOCK_DIAG_BY_FAMILY, 0, 7, &[0; 71])]
    {
        assert!(matches!(lookup_answer(&wrong, 7), Err(ReadError::Malformed(_))), "{wrong:?}");
    }
    let other = socket_message(row(80, "127.0.0.1"), 1);
    assert!(matches!(lookup_answer(&other, 8), Err(ReadError::Malformed(_))));
    assert!(lookup_answer(&[], 7).is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>, kind in 0u16..24, payload: Vec<u8>) {
        let _ = decode(&bytes, Family::V4);
        let _ = lookup_answer(&bytes, 7);
        let framed = message(kind, 0, 7, &payload);
        let (_, rows) = decode(&framed, Family::V6);
        let _ = lookup_answer(&framed, 7);
        prop_assert!(rows.len() <= framed.len() / (HEADER_BYTES + SOCKET_BYTES));
    }
}
