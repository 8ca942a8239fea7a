<?php

// A proxy between a shop's pages and tombola's gateway, for PHP 8.1 or newer. It needs no extension.
//
//     $_SESSION['account_id']       the account of the member who is logged in: your login sets it
//     GATEWAY_URL           where the gateway listens, http://127.0.0.1:8000
//     GATEWAY_API_KEY               the API key of the shop
//
// Let the web server lead /tombola/v1/draws and what is below it to this file. The page then draws with
// `draw(account, { base: '/tombola' })` of draw.js. The proxy spends the points of the session's account, whatever
// account the browser names, and the API key never leaves the server.

declare(strict_types=1);

const BODY_BYTES_MAX = 16 * 1024;
const WAIT_S_MAX = 10.0;
const TIMEOUT_S = 15; // longer than a wait
const PASSED_ON = ['content-type', 'retry-after', 'idempotency-key', 'idempotency-replayed', 'tombola-receipt'];

/** The proxy answers this itself: the code is a status, the message what to say. */
final class Refused extends RuntimeException
{
}

/** Status, headers and body of the gateway's answer. */
function ask(string $path, string $method = 'GET', array $headers = [], string $body = ''): array
{
    $headers[] = 'Authorization: Bearer ' . getenv('GATEWAY_API_KEY');
    $context = stream_context_create(['http' => [
        'method' => $method, 'header' => $headers, 'content' => $body, 'timeout' => TIMEOUT_S, 'ignore_errors' => true,
    ]]);
    $answer = @file_get_contents(rtrim((string) getenv('GATEWAY_URL'), '/') . $path, false, $context);
    if ($answer === false || !preg_match('{^HTTP/\S+ (\d{3})}', $http_response_header[0] ?? '', $status)) {
        throw new Refused('The gateway does not answer. Send the same request again.', 503);
    }
    $kept = array_filter($http_response_header, fn ($it) => in_array(strtolower(strtok($it, ':')), PASSED_ON, true));
    return [(int) $status[1], array_values($kept), $answer];
}

function draw(int $accountId): array
{
    // A page of another site can send a form along with the member's cookie, but no JSON without being asked.
    if (strtolower(trim(explode(';', $_SERVER['CONTENT_TYPE'] ?? '')[0])) !== 'application/json') {
        throw new Refused('Send the body as application/json.', 400);
    }
    $key = $_SERVER['HTTP_IDEMPOTENCY_KEY'] ?? '';
    if (!preg_match('/^[A-Za-z0-9._-]{1,64}$/D', $key)) { // one made here would be a new charge in every repeat
        throw new Refused('The header Idempotency-Key is missing or not valid.', 400);
    }
    $body = (string) file_get_contents('php://input', false, null, 0, BODY_BYTES_MAX + 1);
    if (strlen($body) > BODY_BYTES_MAX) {
        throw new Refused('The body is larger than it may be.', 413);
    }
    $asked = json_decode($body);
    if (!is_object($asked)) {
        throw new Refused('The body is not a JSON object.', 400);
    }
    // The session says who pays: an `account_id` of the browser's is not even read.
    $draw = ['account_id' => $accountId, 'campaign' => ($asked->campaign ?? '') ?: 'default'];
    foreach (['pulls', 'client_nonce'] as $name) { // a nonce made here would be another request in every repeat
        if (isset($asked->$name)) {
            $draw[$name] = $asked->$name;
        }
    }
    return ask('/v1/draws', 'POST', ['Content-Type: application/json', "Idempotency-Key: $key"], json_encode($draw));
}

function show(string $session, int $accountId): array
{
    $wait = is_string($_GET['wait'] ?? null) && is_numeric($_GET['wait']) ? (float) $_GET['wait'] : 0.0;
    $answer = ask("/v1/draws/$session?wait=" . max(0.0, min($wait, WAIT_S_MAX)));
    // The API key may see every account's draws, the member only those of one.
    if ($answer[0] === 200 && (json_decode($answer[2])->account_id ?? null) !== $accountId) {
        throw new Refused('There is no such lottery session.', 404);
    }
    return $answer;
}

function answer(): array
{
    $accountId = $_SESSION['account_id'] ?? null;
    if (!is_int($accountId)) {
        throw new Refused('Log in first.', 401);
    }
    $path = strstr($_SERVER['REQUEST_URI'] . '?', '?', true);
    if ($_SERVER['REQUEST_METHOD'] === 'POST' && str_ends_with($path, '/v1/draws')) {
        return draw($accountId);
    }
    if ($_SERVER['REQUEST_METHOD'] === 'GET' && preg_match('{/v1/draws/([A-Za-z0-9._-]{1,100})$}D', $path, $found)) {
        return show($found[1], $accountId);
    }
    throw new Refused('There is nothing at this path.', 404);
}

session_start(['read_and_close' => true]); // a wait must not hold up the member's other requests
try {
    [$status, $headers, $body] = answer();
} catch (Refused $refused) {
    [$status, $headers] = [$refused->getCode(), ['Content-Type: application/problem+json']];
    $body = json_encode(['title' => $refused->getMessage(), 'status' => $status, 'detail' => $refused->getMessage()]);
}
http_response_code($status);
array_map(header(...), [...$headers, 'Cache-Control: no-store']);
echo $body;
